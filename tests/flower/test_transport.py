"""Clients over Flower's nodes: by which names they go, who is called, and what is said where one does not answer."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'smartmops[federated]'")
from flwr.app import ConfigRecord, Context, RecordDict
from flwr.serverapp import Grid

from smartmops.checks.errors import ClientsRefused
from smartmops.clients.messages import Failure, Hello, Lost, Made, Refusal, pack, unpack
from smartmops.flower import app
from smartmops.flower.frames import receive, send
from smartmops.flower.transport import OverFlower, OverSocket

KEYS = {71: "berlin", 72: "paris", 73: "oslo"}


def hello(name: str) -> bytes:
    return pack(Hello(name, 3, ["a"], "own", {}))


class Fixed:
    """Nodes that say what they are told to."""

    def __init__(self, keys: Mapping[int, str], said: Mapping[int, tuple[bytes, str]]) -> None:
        self.keys, self.said = keys, said
        self.asked: list[dict[int, bytes]] = []

    def there(self) -> dict[int, str]:
        return dict(self.keys)

    def heard(self, nodes: Sequence[int]) -> list[int]:
        return [node for node in nodes if node in self.said]

    def ask(self, kind: str, blobs: Mapping[int, bytes], timeout: float | None) -> Iterator[tuple[int, bytes, str]]:
        self.asked.append({node: blobs[node] for node in blobs})
        yield from ((node, *self.said[node]) for node in blobs if node in self.said)


def over(said: Mapping[int, tuple[bytes, str]], keys: Mapping[int, str] = KEYS, **more: Any) -> OverFlower:
    return OverFlower(Fixed(keys, said), **{"clients": 3, "patience": 60.0} | more)


def test_a_client_goes_by_its_own_name_and_that_of_its_key_where_they_differ() -> None:
    line = over({71: (hello("lab"), ""), 72: (hello("paris"), ""), 73: (hello("attic"), "")})
    named = {number: unpack(blob) for number, blob in line.hello().items()}
    assert [getattr(each, "name", None) for each in named.values()] == ["attic (key oslo)", "lab (key berlin)", "paris"]
    assert line.heard([0, 2]) == {0, 2}
    line.nodes = Fixed(KEYS, {72: (b"", "Flower: gone"), 73: (b"reply", "")})
    assert list(line.exchange({0: b"", 1: b"", 2: b""}, None)) == [(0, b"reply"), (2, Lost("Flower: gone"))]
    assert line.heard([0, 1, 2]) == {0, 2}


def test_without_keys_a_client_goes_by_its_own_name() -> None:
    (only,) = over({71: (hello("lab"), "")}, {71: ""}, clients=1).hello().values()
    assert only == hello("lab")


GOOD = {71: (hello("berlin"), ""), 72: (hello("paris"), "")}


@pytest.mark.parametrize(
    ("third", "error", "said"),
    [
        (
            (hello("paris"), ""),
            ValueError,
            r"key 'paris' goes by the name 'paris', as another .*\n.*key 'oslo' goes by",
        ),
        (
            (b"", "Flower: broken"),
            TimeoutError,
            r"1 of 3 clients .* \(the client with the key 'oslo': Flower: broken\)",
        ),
        (None, TimeoutError, r"2 of 3 clients said who they are.* \(the client with the key 'oslo'\)"),
        ((b"noise", ""), ValueError, "the client with the key 'oslo' cannot take part: it sent a message of 5 bytes"),
        ((pack(Failure(0, 1, "full")), ""), ValueError, "the client with the key 'oslo' cannot take part: full"),
    ],
)
def test_who_does_not_greet_well_is_named_by_its_key(
    third: tuple[bytes, str] | None, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        over(GOOD | ({} if third is None else {73: third})).hello()


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (GOOD | {73: (b"noise", "")}, {73: "the client with the key 'oslo' cannot take part: it sent a message of 5 bytes"}),
        (GOOD | {73: (hello("paris"), "")}, {node: f"the client with the key {key!r} goes by the name 'paris', as another"
                                             for node, key in ((72, "paris"), (73, "oslo"))}),
    ],
)  # fmt: skip
def test_who_cannot_take_part_is_told_why_and_of_no_other_key(
    said: dict[int, tuple[bytes, str]], wanted: dict[int, str]
) -> None:
    line = over(said)
    with pytest.raises(ClientsRefused):
        line.hello()
    assert isinstance(line.nodes, Fixed)
    told = {node: unpack(blob) for node, blob in line.nodes.asked[-1].items()}
    assert told.keys() == wanted.keys()
    for node, found in told.items():
        assert isinstance(found, Refusal) and found.reason.startswith(wanted[node])
        assert not any(key in found.reason for key in {"berlin", "oslo"} - {KEYS[node]})


def test_a_client_of_a_number_is_told_and_nodes_without_a_key_are_not() -> None:
    line = over(GOOD | {73: (hello("attic"), "")})
    line.hello()
    line.refuse({0: "too small"})
    assert isinstance(line.nodes, Fixed) and line.nodes.asked[-1] == {73: pack(Refusal("too small"))}
    bare = over({71: (hello("lab"), "")}, {71: ""}, clients=1)
    bare.hello()
    bare.refuse({0: "too small"})
    assert isinstance(bare.nodes, Fixed) and len(bare.nodes.asked) == 1


def test_who_came_is_named_where_the_others_did_not(capsys: pytest.CaptureFixture[str]) -> None:
    some = {71: "berlin", 72: "paris"}
    with pytest.raises(TimeoutError, match=r"2 of 3 clients came within -1 s \('berlin'; 'paris'\): start the others"):
        over(GOOD, some, patience=-1.0).hello()
    assert "2 of 3 clients are there ('berlin'; 'paris'), waiting" in " ".join(capsys.readouterr().out.split())


# ------------------------------------------------------------------------------------------------------------ the relay
class Wire(Grid):
    """Flower's grid: messages are numbered, `replies` come in when it is next asked; of the dead it says that they are."""

    def __init__(self, unknown: Iterable[int] = ()) -> None:
        self.unknown, self.numbers = set(unknown), itertools.count(1)
        self.pushed: dict[str, tuple[int, str]] = {}
        self.replies: dict[int, str] = {}

    def set_run(self, run_id: int) -> None: ...

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *given: Any, **named: Any) -> Any:
        raise NotImplementedError

    def send_and_receive(self, *given: Any, **named: Any) -> Any:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(KEYS)

    def get_nodes(self) -> list[Any]:
        return [SimpleNamespace(node_id=node, name=key) for node, key in KEYS.items()]

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        (message,) = messages
        if (node := message.metadata.dst_node_id) in self.unknown:
            return [""]
        number = str(next(self.numbers))
        self.pushed[number] = (node, message.metadata.message_type)
        return [number]

    def pull_messages(self, numbers: Iterable[str]) -> list[Any]:
        found = [number for number in numbers if self.pushed[number][0] in self.replies]
        return [self._reply(number, self.replies[self.pushed[number][0]]) for number in found]

    def _reply(self, number: str, text: str) -> Any:
        wrong = text.startswith("!")
        return SimpleNamespace(
            metadata=SimpleNamespace(reply_to_message_id=number), has_error=lambda: wrong,
            error=SimpleNamespace(reason=text[1:]),
            content=RecordDict({"blob": ConfigRecord({"blob": text.encode()})}),
        )  # fmt: skip


@pytest.fixture(autouse=True)
def plain_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's own can be made within a run alone."""

    def made(content: Any, node: int, kind: str) -> Any:
        return SimpleNamespace(content=content, metadata=SimpleNamespace(dst_node_id=node, message_type=kind))

    monkeypatch.setattr(app, "Message", made)


def test_a_node_that_flower_has_no_message_for_is_told_apart_and_not_waited_for() -> None:
    wire = Wire(unknown=[73])
    wire.replies = {71: "good", 72: "!gone"}
    found = {node: (blob, wrong) for node, blob, wrong in app.ask(wire, "train", dict.fromkeys(KEYS, b""), None)}
    assert found == {71: (b"good", ""), 72: (b"", "Flower: gone"), 73: (b"", "Flower did not take the message for it")}


def test_a_node_that_says_nothing_is_waited_for_as_long_as_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    wire, now = Wire(), [100.0]
    wire.replies = {71: "good"}
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda _: now.__setitem__(0, now[0] + 10))
    monkeypatch.setattr(app, "time", clock)
    found = {node: blob for node, blob, _ in app.ask(wire, "train", dict.fromkeys(KEYS, b""), 25.0)}
    assert found == {71: b"good"} and now == [130.0]


def test_no_more_messages_are_under_way_than_are_wanted_at_once() -> None:
    wire = Wire(unknown=[73])
    wire.replies = {node: "good" for node in KEYS}
    told, made = app.ask(wire, "train", Made(KEYS, lambda node: b"job"), None, at_once=1), []
    for node, blob, _ in told:
        made.append((node, blob, len(wire.pushed)))
    assert made == [(71, b"good", 1), (72, b"good", 2), (73, b"", 2)]


def test_who_is_silent_is_called_once_until_it_answers() -> None:
    wire, calls = Wire(), dict[str, int]()

    def heard(nodes: list[int]) -> list[int]:
        return app.heard(wire, nodes, calls)

    assert heard([71, 72]) == [] and wire.pushed == {"1": (71, "query"), "2": (72, "query")}
    assert heard([71, 72]) == [] and len(wire.pushed) == 2
    wire.replies = {71: "here", 72: "!gone"}
    assert heard([71, 72]) == [71] and calls == {"3": 72}, "of whom Flower says that it is gone is called again"
    wire.replies = {72: "late"}
    assert heard([]) == [] and calls == {}, "an answer that nobody asks for any more is no sign of life later on"
    wire.replies = {}
    assert heard([72]) == []


def test_the_relay_says_who_is_there_and_who_was_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = socket.socketpair()
    monkeypatch.setattr(app, "connect", lambda path: right)
    wire = Wire()
    thread = threading.Thread(target=_serve, args=(wire,))
    thread.start()
    with left:
        nodes = OverSocket(left)
        assert nodes.there() == KEYS
        wire.replies = {71: "here"}
        assert nodes.heard([71, 72]) == [] and nodes.heard([71, 72]) == [71]
        assert list(nodes.ask("query", {71: b""}, None)) == [(71, b"here", "")]
        send(left, {"do": "nodes"})
        assert set(receive(left)[0]["nodes"]) == set(map(str, KEYS))
    thread.join()


def _serve(wire: Wire) -> None:
    app.serve(wire, Context(1, 1, {}, RecordDict(), {"socket": ""}))
