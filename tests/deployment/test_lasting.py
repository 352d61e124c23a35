"""A client outlives the servers it answers: when its SuperNode is started again, and when it has ended for good."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from smartmops.deployment import client as module
from smartmops.deployment.client import ClientConfig

LONG, SHORT = 0.6, 0.0


@pytest.mark.parametrize(
    ("lives", "status"),
    [
        ([(SHORT, 1)] * 4, 1),  # it cannot start
        ([(SHORT, 0)] * 4, 1),  # it is sent away again and again
        ([(SHORT, 1), (LONG, 7)], 7),  # the server had just come up; later it was gone for `max_wait`
        ([(LONG, 0), (SHORT, 1), (LONG, 0), (LONG, 3)], 3),  # two new servers, one after the other
    ],
)
def test_a_supernode_is_started_again_until_it_cannot_be(
    monkeypatch: pytest.MonkeyPatch, lives: list[tuple[float, int]], status: int
) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.0)
    monkeypatch.setattr(module, "LASTING", LONG / 2)
    to_come = iter(lives)

    def started(config: ClientConfig, path: str) -> subprocess.Popen[bytes]:
        seconds, code = next(to_come)
        return subprocess.Popen(["sh", "-c", f"sleep {seconds}; exit {code}"])

    monkeypatch.setattr(module, "supernode", started)
    own = ClientConfig(model="tiny", data=Path("x.jsonl"), server="localhost:1", keys=Path("keys"))
    assert module._lasting(own, "unused") == status
    assert next(to_come, None) is None
