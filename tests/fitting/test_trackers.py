"""What a run tells a tracker, and that it trains the same with one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from smartmops.checks.limits import check
from smartmops.flow.trainer import train
from smartmops.runs.folder import Run

Make = Callable[..., Any]


def test_tensorboard_holds_the_losses_and_perplexities_of_the_curves(config: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain, told = tmp_path / "plain", tmp_path / "told"
    for out, trackers in ((plain, ()), (told, ("tensorboard",))):
        train(config(out=out, report_to=trackers, validation_share=0.2, eval_every=4, samples_per_task=0))
    one, other = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (plain, told))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (plain / "tensorboard").exists()
    found = EventAccumulator(str(told / "tensorboard")).Reload()
    curves = Run.open(told).read_curves()
    for name, key in (("train/loss", "loss"), ("eval/perplexity", "eval_perplexity")):
        wanted = {row["step"]: row[key] for row in curves if key in row}
        assert {each.step: each.value for each in found.Scalars(name)} == pytest.approx(wanted, rel=1e-5)
        assert len(wanted) >= 2


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_loaded(
    config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smartmops.options.training.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--report-to wandb: wandb is not installed: pip install wandb"):
        check(config(report_to=("wandb",)))
