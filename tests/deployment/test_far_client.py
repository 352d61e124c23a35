"""What a client's operator is told before Flower's node starts, and how long the client goes on afterwards."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from smartmops.clients.messages import VERSION, Failure, Refusal, pack, unpack
from smartmops.deployment import client as module
from smartmops.deployment.client import ClientConfig, Refusals, Welcome, federate_client, free_port, knock
from smartmops.deployment.front import RECENT, Front, standing
from smartmops.deployment.guard import guarded
from smartmops.deployment.keys import KeysConfig, make_keys
from smartmops.deployment.knocks import Door, Keyring, Knocks
from smartmops.federated.client import Worker
from smartmops.reading.task import Task


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    make_keys(KeysConfig(out=tmp_path / "keys", clients=("berlin", "paris")))
    return tmp_path / "keys"


@pytest.fixture
def said() -> list[str]:
    """What the server's operator is told."""
    return []


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def server(keys: Path, said: list[str]) -> Iterator[tuple[Front, int]]:
    """A front with no SuperLink behind it, and its port."""
    own, port = keys / "server", free_port()
    front = Front(
        "https://127.0.0.1:1", own / "ca.crt", 1000, Door(Keyring(own / "clients")), Knocks(said.append), Clock()
    )
    with standing(front, "127.0.0.1", port, own / "server.crt", own / "server.key"):
        yield front, port


def client(keys: Path, port: int, name: str = "berlin", host: str = "localhost") -> ClientConfig:
    return ClientConfig(model="tiny", data=Path("x.jsonl"), server=f"{host}:{port}", keys=keys / "clients" / name)


def test_a_client_whose_key_is_known_is_told_under_which_name(server: tuple[Front, int], keys: Path) -> None:
    found = knock(client(keys, server[1]))
    assert not found.final and not found.wait and found.said.endswith("knows this key as 'berlin'")


def test_a_wrong_key_is_the_end_and_both_operators_know(
    server: tuple[Front, int], keys: Path, said: list[str], tmp_path: Path
) -> None:
    make_keys(KeysConfig(out=tmp_path / "others", clients=("berlin",)))
    shutil.copy(tmp_path / "others" / "clients" / "berlin" / "client.key", keys / "clients" / "berlin")
    found = knock(client(keys, server[1]))
    assert found.final and str(keys / "clients" / "berlin" / "client.key") in found.said
    assert "none of the clients'" in found.said and "ask its operator" in found.said
    assert said and "127.0.0.1: a key that is none of the clients'" in said[0]


def test_a_key_taken_back_is_the_end(server: tuple[Front, int], keys: Path, said: list[str]) -> None:
    assert not knock(client(keys, server[1])).final
    (keys / "server" / "clients" / "berlin.pub").unlink()
    found = knock(client(keys, server[1]))
    assert found.final and "none of the clients'" in found.said
    assert not knock(client(keys, server[1], "paris")).final
    assert len(said) == 1


@pytest.mark.parametrize("where", ["server", "client"])
def test_a_wrong_authority_is_the_end_and_nothing_is_sent(
    server: tuple[Front, int], keys: Path, said: list[str], tmp_path: Path, where: str
) -> None:
    """The client was given another federation's ca.crt, or calls another federation's server."""
    make_keys(KeysConfig(out=tmp_path / "others", clients=("berlin",)))
    if where == "client":
        shutil.copy(tmp_path / "others" / "server" / "ca.crt", keys / "clients" / "berlin")
        asked = client(keys, server[1])
    else:
        asked = client(tmp_path / "others", server[1])
    found = knock(asked)
    assert found.final and "is not the one that" in found.said and "ca.crt vouches for" in found.said
    assert server[0].door.used == {} and said == []


def test_a_name_that_the_certificate_lacks_is_the_end(server: tuple[Front, int], keys: Path) -> None:
    found = knock(client(keys, server[1], host="127.1"))  # another way to write an address it holds
    assert found.final and "is not for 127.1" in found.said and "--hosts" in found.said


def test_a_file_that_is_no_certificate_is_the_end(keys: Path) -> None:
    (keys / "clients" / "berlin" / "ca.crt").write_text("no certificate")
    found = knock(client(keys, free_port()))
    assert found.final and "holds no certificate" in found.said


def test_of_two_clients_with_one_key_the_second_waits_and_both_operators_know(
    server: tuple[Front, int], keys: Path, said: list[str]
) -> None:
    front, port = server
    clock = front.clock
    assert isinstance(clock, Clock)
    front.heard["berlin"] = clock.now
    found = knock(client(keys, port))
    assert found.wait and not found.final and "('berlin')" in found.said and "a key of its own" in found.said
    assert said == ["refused 127.0.0.1: a client whose key another one uses, or was killed with a minute ago: "
                    "the key is that of 'berlin'"]  # fmt: skip
    assert not knock(client(keys, port, "paris")).wait
    clock.now += RECENT
    assert not knock(client(keys, port)).wait


def test_nobody_there_is_no_answer(keys: Path) -> None:
    assert knock(client(keys, free_port())) == module.Welcome()


def test_what_is_no_front_of_ours_is_left_to_flower(server: tuple[Front, int], keys: Path) -> None:
    for status, text in [(200, "[]"), (200, "{"), (404, "not found"), (502, ""), (503, "later")]:
        assert module._meant(client(keys, server[1]), status, text) == module.Welcome()


def test_a_client_starts_its_node_once_it_is_welcome_and_ends_once_it_is_not(
    keys: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    busy, good = module.Welcome("busy [1]", wait=True), module.Welcome("good")
    to_come = iter([busy, busy, good, module.Welcome("taken back", final=True)])
    paused: list[float] = []
    started: list[str] = []

    @contextmanager
    def supernode(config: ClientConfig, path: str) -> Iterator[subprocess.Popen[bytes]]:
        started.append(path)
        yield subprocess.Popen(["true"])

    monkeypatch.setattr(module, "knock", lambda config: next(to_come))
    monkeypatch.setattr(module, "supernode", supernode)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=Clock(), sleep=paused.append))
    assert module._lasting(client(keys, 1), "unused", threading.Event()) == 1
    assert started == ["unused"] and paused == [module.PAUSE] * 3
    assert capsys.readouterr().out.split() == ["busy", "[1]", "good", "taken", "back"]


LONG, SHORT = module.LASTING + 1, 1.0


@pytest.mark.parametrize(
    ("lives", "status"),
    [
        ([(SHORT, 1)] * 4, 1),  # it cannot start
        ([(SHORT, 0)] * 4, 1),  # it is sent away again and again
        ([(SHORT, 1), (SHORT, 1), (LONG, 0), *[(SHORT, 7)] * 4], 7),  # the server had just come up; later it is another
    ],
)
def test_a_supernode_is_started_again_until_it_cannot_be(
    monkeypatch: pytest.MonkeyPatch, lives: list[tuple[float, int]], status: int
) -> None:
    clock, to_come = Clock(), iter(lives)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock, sleep=lambda seconds: None))
    monkeypatch.setattr(module, "knock", lambda config: Welcome())

    def started(config: ClientConfig, path: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
        seconds, code = next(to_come)
        clock.now += seconds
        return guarded(["sh", "-c", f"exit {code}"])

    monkeypatch.setattr(module, "supernode", started)
    own = ClientConfig(model="tiny", data=Path("x.jsonl"), server="localhost:1", keys=Path("keys"))
    assert module._lasting(own, "unused", threading.Event()) == status
    assert next(to_come, None) is None


def test_a_wrong_key_ends_a_client_before_its_model_is_loaded(
    server: tuple[Front, int], keys: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "worker_of_file", lambda config: pytest.fail("a model is loaded"))
    (keys / "server" / "clients" / "berlin.pub").unlink()
    (tmp_path / "x.jsonl").touch()
    assert federate_client(replace(client(keys, server[1]), data=tmp_path / "x.jsonl")) == 1
    assert "refuses" in capsys.readouterr().out


OTHER = pack(Refusal("too small")).replace(f'\\"version\\": {VERSION}'.encode(), b'\\"version\\": 9')


@pytest.mark.parametrize(
    ("blob", "said"),
    [
        (pack(Refusal("another [base]\n")), "another [base]"),
        (OTHER, f"version 9, but this side speaks version {VERSION}: install the same"),
    ],
)
def test_a_client_that_is_refused_says_why_and_ends(
    blob: bytes, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ASKING", 0.1)
    monkeypatch.setattr(module, "knock", lambda config: Welcome())
    refusals = Refusals("here:1")

    @contextmanager
    def started(config: ClientConfig, path: str) -> Iterator[subprocess.Popen[bytes]]:
        with guarded(["sleep", "600"]) as node:
            assert refusals.read("query", blob)
            yield node

    monkeypatch.setattr(module, "supernode", started)
    own = ClientConfig(model="tiny", data=Path("x.jsonl"), server="here:1", keys=Path("keys"))
    assert module._lasting(own, "unused", refusals.came) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("the server at here:1 refuses this client: ") and said in shown


def test_what_is_no_refusal_is_the_workers(capsys: pytest.CaptureFixture[str]) -> None:
    refusals = Refusals("here:1")
    for kind, blob in [("query", b""), ("train", pack(Refusal("no"))), ("query", pack(Failure(0, 0, "no")))]:
        assert refusals.read(kind, blob) == b""
    assert not refusals.came.is_set() and capsys.readouterr().out == ""


def test_a_job_of_another_version_is_answered_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    worker = Worker(Task.__new__(Task), [range(0)], ["berlin"], "own")
    found = unpack(module._said(worker, "train", OTHER))
    assert isinstance(found, Failure) and "version 9" in found.reason
    assert "a job failed: " in capsys.readouterr().out


def test_a_client_ends_when_nobody_listens_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ASKING", 0.1)
    monkeypatch.setattr(module, "knock", lambda config: Welcome())
    nodes: list[subprocess.Popen[bytes]] = []

    @contextmanager
    def started(config: ClientConfig, path: str) -> Iterator[subprocess.Popen[bytes]]:
        with guarded(["sleep", "600"]) as node:
            nodes.append(node)
            yield node

    monkeypatch.setattr(module, "supernode", started)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        own = ClientConfig(
            model="tiny", data=Path("x.jsonl"), server=f"127.0.0.1:{port}", keys=Path("keys"), max_wait=0.5
        )
        closing = threading.Timer(1.5, listener.close)
        closing.start()
        began = time.monotonic()
        assert module._lasting(own, "unused", threading.Event()) == 1
    assert time.monotonic() - began > 1.9 and [node.poll() is not None for node in nodes] == [True]
