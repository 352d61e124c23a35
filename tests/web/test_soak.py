"""Good and bad clients together, as `scripts/soak.py` sends them: nothing is lost, nothing is kept."""

from __future__ import annotations

import random
import runpy
from pathlib import Path

import pytest

from smartmops.serving.answering import Answerer

pytest.importorskip("fastapi")


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_is_kept(answerer: Answerer) -> None:
    soak = runpy.run_path(str(Path(__file__).parents[2] / "scripts/soak.py"))["Soak"](answerer)
    told = soak.run(84)
    soak.settle()
    assert set(soak.left().values()) == {0}, soak.left()
    assert {kind for kind, _ in told} == set(soak.kinds)
    assert not [what for _, what in told if what.startswith("wrong")]
    assert told["whole", "answered"] + told["stream", "answered"] == 42
    assert soak.batcher.counts.failed == 0 and soak.whole(random.Random(0)) == "answered"
    soak.end()
