"""A compression that dies at a solve of our choosing."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from smartmops.compression.solvers import SOLVERS, sparsegpt


class Killed(BaseException):
    """As Ctrl-C."""


def kill_at_solve(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    calls: list[int] = []

    def solver(*args: Any) -> Tensor:
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return sparsegpt(*args)

    monkeypatch.setitem(SOLVERS, "sparsegpt", solver)
