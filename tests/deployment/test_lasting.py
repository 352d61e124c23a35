"""A client outlives the servers it answers: when its SuperNode is started again, and when it has ended for good."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from smartmops.deployment import client as module
from smartmops.deployment.client import ClientConfig, Welcome
from smartmops.deployment.guard import guarded

LONG, SHORT = 0.6, 0.0


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
    monkeypatch.setattr(module, "PAUSE", 0.0)
    monkeypatch.setattr(module, "knock", lambda config: Welcome())
    monkeypatch.setattr(module, "LASTING", LONG / 2)
    to_come = iter(lives)

    def started(config: ClientConfig, path: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
        seconds, code = next(to_come)
        return guarded(["sh", "-c", f"sleep {seconds}; exit {code}"])

    monkeypatch.setattr(module, "supernode", started)
    own = ClientConfig(model="tiny", data=Path("x.jsonl"), server="localhost:1", keys=Path("keys"))
    assert module._lasting(own, "unused") == status
    assert next(to_come, None) is None


def test_a_client_ends_when_nobody_listens_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ASKING", 0.1)
    monkeypatch.setattr(module, "knock", lambda config: Welcome())
    nodes: list[subprocess.Popen[bytes]] = []

    @contextmanager
    def started(config: ClientConfig, path: str) -> Iterator[subprocess.Popen[bytes]]:
        with guarded(["sleep", "60"]) as node:
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
        assert module._lasting(own, "unused") == 1
    assert time.monotonic() - began > 1.9 and [node.poll() is not None for node in nodes] == [True]
