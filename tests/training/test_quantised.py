"""MoPs on quantised bases: as good as on the same weights dequantised, and a base calibrated on the test split is told of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from smartmops.base import load_base
from smartmops.compression import layerwise
from smartmops.compression.compress import CompressConfig, compress
from smartmops.compression.solvers import Pattern
from smartmops.tiny import BASE
from smartmops.training.baselines import load_run
from smartmops.training.evaluate import evaluate
from smartmops.training.task import Task
from smartmops.training.trainer import TrainConfig, train


def _store(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [None, 0.75])
def test_training_on_int8_ends_within_2_percent_of_training_on_the_same_weights_dequantised(
    sparsity: float | None, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="int8 needs pip install 'smartmops[int8]'")
    dense, _ = load_base("tiny", "auto")
    if sparsity:
        layerwise.prune(dense, [], Pattern.parse(sparsity), "magnitude")
    pruned = _store(dense, tmp_path / "pruned")
    model, _ = load_base(pruned, "auto", "int8")
    found = {}
    for name in ("int8", "dequantised"):
        base = _store(model if name == "int8" else model.dequantize(torch.bfloat16), tmp_path / name)
        run = train(TrainConfig(model=base, data="office", out=tmp_path / f"run-{name}", limit=300, steps=12,
                                prompt_lr=3.0, samples_per_task=0, log_every=1))  # fmt: skip
        found[name] = run["perplexity"]["overall"]
        assert found[name] < 0.8 * run["perplexity_frozen"]["overall"], "the prompts learn something"
    assert found["int8"] == pytest.approx(found["dequantised"], rel=0.02)


@pytest.mark.slow
def test_a_run_on_an_int8_base_loads_again_to_the_same_perplexity(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="int8 needs pip install 'smartmops[int8]'")
    compress(CompressConfig(model="tiny", out=tmp_path / "base", int8=True))
    config = TrainConfig(model=str(tmp_path / "base"), data="office", out=tmp_path / "run", limit=100, steps=2)
    metrics = train(config)
    model, tokenizer, _ = load_run(tmp_path / "run")
    again = Task.load(config, model, tokenizer)
    assert evaluate(model, again.test, again.collator).overall == pytest.approx(
        metrics["perplexity"]["overall"], rel=1e-3
    )


def test_a_base_calibrated_on_the_test_split_is_told_of(
    config: Callable[..., TrainConfig], base_folder: Path, two_tasks: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "compressed"
    compress(CompressConfig(model=str(base_folder), out=folder, sparsity=0.5, calibration=str(two_tasks), sequences=8))
    assert json.loads((folder / "compression.json").read_text())["calibration"]["split"]["seed"] == 0
    Task.load(config(model=str(folder)))
    assert "calibrated on another split" not in capsys.readouterr().out
    Task.load(config(model=str(folder), data_seed=1))
    told = " ".join(capsys.readouterr().out.split())
    assert "calibrated on another split" in told and "--data-seed" in told
