"""Our transport over Flower's nodes: who they are, which client each is, and blobs there and back.

Knows messages and node numbers. Knows neither Ray nor TLS: who made the nodes is another file's business.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

from smartmops.checks.errors import ClientsRefused, FederationError, FederationTimeout
from smartmops.clients.admission import greeting
from smartmops.clients.messages import Hello, Lost, Made, Refusal, pack
from smartmops.clients.roster import listed
from smartmops.progress.bars import console

from .frames import receive, send

PARTING = 60.0  # seconds that clients which cannot take part may need to read why


@runtime_checkable
class Nodes(Protocol):
    """What Flower offers a server."""

    def there(self) -> dict[int, str]:
        """All nodes that are there now, each with the name of its key; "" where nodes have none."""
        ...

    def heard(self, nodes: Sequence[int]) -> list[int]:
        """Those that have answered a call since this was last asked; the others are called, and not waited for."""
        ...

    def ask(self, kind: str, blobs: Mapping[int, bytes], timeout: float | None) -> Iterator[tuple[int, bytes, str]]:
        """Node, answer, and what went wrong ("" if nothing), as they come in."""
        ...


class OverSocket:
    """Nodes behind the relay that Flower runs as its ServerApp."""

    def __init__(self, line: socket.socket) -> None:
        self.line = line

    def there(self) -> dict[int, str]:
        """All nodes that are there now, each with the name of its key."""
        send(self.line, {"do": "nodes"})
        return {int(node): str(key) for node, key in receive(self.line)[0]["nodes"].items()}

    def heard(self, nodes: Sequence[int]) -> list[int]:
        """Those that have answered a call since this was last asked; the others are called."""
        send(self.line, {"do": "heard", "nodes": [str(node) for node in nodes]})
        return [int(node) for node in receive(self.line)[0]["nodes"]]

    def ask(self, kind: str, blobs: Mapping[int, bytes], timeout: float | None) -> Iterator[tuple[int, bytes, str]]:
        """Node, answer, and what went wrong, as they come in."""
        words = {"do": "ask", "kind": kind, "timeout": timeout, "nodes": [str(node) for node in blobs]}
        send(self.line, words, list(blobs.values()))
        while not (found := receive(self.line))[0].get("done"):
            yield int(found[0]["node"]), found[1][0], found[0]["wrong"]


class OverFlower:
    """Jobs to nodes and replies back; clients are numbered in the order of the names they give.

    Args:
        nodes: What Flower offers.
        clients: How many are waited for before anything starts.
        patience: Seconds that they are waited for.
    """

    def __init__(self, nodes: Nodes, clients: int, patience: float) -> None:
        self.nodes, self.clients, self.patience = nodes, clients, patience
        self._node_of: dict[int, int] = {}
        self._keys: dict[int, str] = {}

    def hello(self) -> dict[int, bytes]:
        """Of every client, by number; to a name that is not that of the client's key, the key's is added.

        Raises:
            FederationTimeout: too few nodes came, or too few of them answered.
            ClientsRefused: some go by one name, or sent something else than a greeting; they are told.
        """
        found, self._keys = self._greetings()
        hellos, wrong = dict[int, Hello](), dict[int, str]()
        for node, blob in found.items():
            try:
                hellos[node] = greeting(blob, _who(node, self._keys))
            except FederationError as error:
                wrong[node] = str(error)
        self._node_of = dict(enumerate(sorted(found, key=lambda node: hellos[node].name if node in hellos else "")))
        if wrong := wrong or self._namesakes(hellos):
            client_of = {node: number for number, node in self._node_of.items()}
            refused = ClientsRefused.of({client_of[node]: reason for node, reason in wrong.items()})
            self.refuse(refused.reasons)
            raise refused
        return {number: pack(_known(hellos[node], self._keys[node])) for number, node in self._node_of.items()}

    def _namesakes(self, hellos: Mapping[int, Hello]) -> dict[int, str]:
        """Why nodes that go by the name of another cannot take part."""
        count = Counter(hello.name for hello in hellos.values())
        return {node: f"{_who(node, self._keys)} goes by the name {hello.name!r}, as another client does: give each a "
                "--name of its own" for node, hello in hellos.items() if count[hello.name] > 1}  # fmt: skip

    def _greetings(self) -> tuple[dict[int, bytes], dict[int, str]]:
        """What each node that has examples says of itself, and the name of every node's key."""
        keys, end = self._there()
        found: dict[int, bytes] = {}
        wrong: list[str] = []
        for node, blob, reason in self.nodes.ask("query", dict.fromkeys(keys, b""), max(end - time.monotonic(), 60.0)):
            found[node] = blob
            wrong += [f"{_who(node, keys)}: {reason}"] if reason else []
        if wrong:
            raise FederationTimeout(f"{len(wrong)} of {len(keys)} clients did not say who they are{listed(wrong)}: see "
                                    "to them and start again")  # fmt: skip
        if len(found) < self.clients:
            silent = [_who(node, keys) for node in keys if node not in found]
            raise FederationTimeout(f"{len(found)} of {self.clients} clients said who they are: see to the others"
                                    + listed(silent))  # fmt: skip
        return {node: blob for node, blob in found.items() if blob}, keys

    def _there(self) -> tuple[dict[int, str], float]:
        """The nodes, once there are enough, with the names of their keys; and until when patience lasts."""
        end, told = time.monotonic() + self.patience, -1
        while len(keys := self.nodes.there()) < self.clients:
            named = listed(sorted(map(repr, filter(None, keys.values()))))
            if len(keys) != told:
                told = len(keys)
                console.print(f"{told} of {self.clients} clients are there{named}, waiting for the others")
            if time.monotonic() > end:
                raise FederationTimeout(
                    f"{told} of {self.clients} clients came within {self.patience:g} s{named}: "
                    "start the others, wait longer with --patience, or lower --clients"
                )
            time.sleep(0.2)
        return keys, end

    def exchange(self, jobs: Mapping[int, bytes], timeout: float | None) -> Iterator[tuple[int, bytes | Lost]]:
        """Client and packed reply, as they come in; what Flower itself reports wrong comes as `Lost`."""
        client_of = {self._node_of[client]: client for client in jobs}
        blobs = Made(client_of, lambda node: jobs[client_of[node]])
        for node, blob, wrong in self.nodes.ask("train", blobs, timeout):
            yield client_of[node], Lost(wrong) if wrong else blob

    def heard(self, clients: Iterable[int]) -> set[int]:
        """Those that have answered a call since this was last asked; the others are called, and not waited for."""
        client_of = {self._node_of[client]: client for client in clients}
        return {client_of[node] for node in self.nodes.heard(list(client_of))}

    def refuse(self, reasons: Mapping[int, str]) -> None:
        """Waits for each to have read it, `PARTING` seconds at most; nodes without keys are nobody's."""
        nodes = {self._node_of[client]: reason for client, reason in reasons.items()}
        blobs = {node: pack(Refusal(reason)) for node, reason in nodes.items() if self._keys[node]}
        for _ in self.nodes.ask("query", blobs, PARTING) if blobs else ():
            pass

    def close(self) -> None:
        """Nothing is held here."""


def _who(node: int, keys: Mapping[int, str]) -> str:
    """A client that has not said its name."""
    return f"the client with the key {keys[node]!r}" if keys[node] else f"a client (Flower's node {node})"


def _known(hello: Hello, key: str) -> Hello:
    """With the name that the server's operator gave to the client's key beside the one it gives itself."""
    return replace(hello, name=f"{hello.name} (key {key})") if key not in ("", hello.name) else hello
