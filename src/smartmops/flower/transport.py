"""Our transport over Flower's nodes: who they are, which client each is, and blobs there and back.

Knows messages and node numbers. Knows neither Ray nor TLS: who made the nodes is another file's business.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Protocol, runtime_checkable

from rich.console import Console

from smartmops.federated.messages import Failure, pack, unpack

from .frames import receive, send

console = Console()


@runtime_checkable
class Nodes(Protocol):
    """What Flower offers a server."""

    def ids(self) -> list[int]:
        """Of all nodes that are there now."""
        ...

    def ask(self, kind: str, blobs: Mapping[int, bytes], timeout: float | None) -> Iterator[tuple[int, bytes, str]]:
        """Node, answer, and what went wrong ("" if nothing), as they come in."""
        ...


class OverSocket:
    """Nodes behind the relay that Flower runs as its ServerApp."""

    def __init__(self, line: socket.socket) -> None:
        self.line = line

    def ids(self) -> list[int]:
        """Of all nodes that are there now."""
        send(self.line, {"do": "nodes"})
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

    def hello(self) -> dict[int, bytes]:
        """Of every client, by number.

        Raises:
            TimeoutError: too few nodes came, or too few of them answered.
            ValueError: two clients go by one name.
        """
        found = {node: blob for node, blob, _ in self._greetings() if blob}
        names = {node: getattr(unpack(blob), "name", f"? {node}") for node, blob in found.items()}
        ordered = sorted(found, key=lambda node: names[node])
        for left, right in pairwise(ordered):
            if names[left] == names[right]:
                raise ValueError(f"two clients go by the name {names[left]!r}: give one another --name")
        self._node_of = dict(enumerate(ordered))
        return {number: found[node] for number, node in self._node_of.items()}

    def _greetings(self) -> list[tuple[int, bytes, str]]:
        end, told = time.monotonic() + self.patience, -1
        while len(nodes := self.nodes.ids()) < self.clients:
            if len(nodes) != told:
                told = len(nodes)
                console.print(f"{told} of {self.clients} clients are there, waiting for the others")
            if time.monotonic() > end:
                raise TimeoutError(f"{len(nodes)} of {self.clients} clients came within {self.patience:g} s: start "
                                   "the others, wait longer with --patience, or lower --clients")  # fmt: skip
            time.sleep(0.2)
        found = list(self.nodes.ask("query", dict.fromkeys(nodes, b""), max(end - time.monotonic(), 60.0)))
        if wrong := [reason for _, _, reason in found if reason]:
            raise TimeoutError(f"{len(wrong)} of {len(nodes)} clients did not say who they are ({wrong[0]})")
        if len(found) < self.clients:
            raise TimeoutError(f"{len(found)} of {self.clients} clients said who they are: see to the others")
        return found

    def exchange(self, jobs: Mapping[int, bytes], timeout: float | None) -> Iterator[tuple[int, bytes]]:
        """Client and packed reply, as they come in; what Flower itself reports wrong comes as a `Failure`."""
        client_of = {self._node_of[client]: client for client in jobs}
        blobs = {self._node_of[client]: blob for client, blob in jobs.items()}
        for node, blob, wrong in self.nodes.ask("train", blobs, timeout):
            client = client_of[node]
            yield client, pack(Failure(0, client, wrong)) if wrong else blob

    def close(self) -> None:
        """Nothing is held here."""
