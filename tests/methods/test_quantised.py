"""MoPs on quantised bases: as good as on the same weights dequantised, and a base calibrated on the test split is told of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from smartmops.base import load_base
from smartmops.checks.errors import RunError
from smartmops.compression import layerwise
from smartmops.compression.compress import CompressConfig, compress
from smartmops.compression.solvers import Pattern
from smartmops.evaluation.perplexity import evaluate
from smartmops.flow.trainer import TrainConfig, train
from smartmops.methods.baselines import load_run
from smartmops.preparing.adapting import adapt
from smartmops.reading.task import Task
from smartmops.tiny import BASE


def _store(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=[None, 0.75], ids=["dense", "75% zeros"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The embedded model in int8, and the same weights dequantised."""
    pytest.importorskip("bitsandbytes", reason="int8 needs pip install 'smartmops[int8]'")
    folder = tmp_path_factory.mktemp("both")
    dense, _ = load_base("tiny", "float32")
    if request.param:
        layerwise.prune(dense, [], Pattern.parse(request.param), "magnitude")
    model, _ = load_base(_store(dense, folder / "dense"), "float32", "int8")
    return {
        "int8": _store(model, folder / "int8"),
        "dequantised": _store(model.dequantize(torch.float32), folder / "dequantised"),
    }


def _config(base: str, out: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(**{
        "model": base, "data": "office", "out": out, "experts": 7, "limit": 100, "dtype": "float32", "steps": 8, "batch_size": 4,
        "max_length": 160, "prompt_lr": 1.0, "warmup_steps": 0, "samples_per_task": 0, "recovery_prompts": 0,
        "validation_share": 0.0, "gate_pretraining_steps": 50, "expert_kind": "hidden_states",
    } | changes)  # fmt: skip


def _states(base: str, config: TrainConfig, states: list[dict[str, Tensor]]) -> list[tuple[float, Tensor]]:
    """Loss on the same 4 examples, and gradient of what is trained, at each state; a first one is made if none is given."""
    task = Task.load(replace(config, model=base))
    model, _, _ = adapt(task, config, config, 0)
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    if not states:
        start = {name: each.detach().clone() for name, each in trained.items()}
        states += [start, {name: each + 0.3 * each.std() * torch.randn_like(each) for name, each in start.items()}]
    found = []
    for state in states:
        with torch.no_grad():
            for name, each in trained.items():
                each.copy_(state[name])
        model.zero_grad()
        loss = model.eval()(**task.collator(task.train[:4])).loss
        loss.backward()
        gradient = torch.cat([each.grad.flatten() for each in trained.values() if each.grad is not None])
        found.append((loss.item(), gradient))
    return found


def test_losses_and_gradients_of_the_same_state_are_those_of_the_dequantised_weights(
    both: dict[str, str], tmp_path: Path
) -> None:
    config, states = _config(both["int8"], tmp_path), list[dict[str, Tensor]]()
    int8, dequantised = (_states(base, config, states) for base in both.values())
    for (loss, gradient), (want, its) in zip(int8, dequantised, strict=True):
        assert loss == pytest.approx(want, rel=0.01)
        assert torch.nn.functional.cosine_similarity(gradient, its, dim=0) > 0.99
        assert gradient.norm().item() == pytest.approx(its.norm().item(), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("both", [None], indirect=True, ids=["dense"])
def test_what_training_on_int8_reaches_differs_no_more_than_seeds_do(both: dict[str, str], tmp_path: Path) -> None:
    """Small differences grow in training until runs differ as two seeds do, so single runs are not compared."""
    found: dict[str, list[float]] = {name: [] for name in both}
    for name, base in both.items():
        for seed in range(3):
            run = train(_config(base, tmp_path / f"{name}-{seed}", seed=seed))
            found[name].append(run["perplexity"]["overall"])
            assert found[name][-1] < run["perplexity_frozen"]["overall"], "the prompts learn something"
    everything = [*found["int8"], *found["dequantised"]]
    means = {name: sum(values) / len(values) for name, values in found.items()}
    assert abs(means["int8"] - means["dequantised"]) <= max(everything) - min(everything)


@pytest.mark.slow
def test_a_run_on_an_int8_base_loads_again_to_the_same_perplexity(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="int8 needs pip install 'smartmops[int8]'")
    compress(CompressConfig(model="tiny", out=tmp_path / "base", int8=True, calibration="office", limit=100))
    config = TrainConfig(model=str(tmp_path / "base"), data="office", out=tmp_path / "run", limit=100, steps=2,
                         dtype="float32", samples_per_task=0)  # fmt: skip
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


def test_a_run_is_not_loaded_on_other_quantised_weights(both: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(both["int8"], tmp_path / "int8")
    config = _config(str(tmp_path / "int8"), tmp_path / "run", steps=1)
    train(config)
    shutil.copy(config.out / "adapter" / "adapter_model.safetensors", tmp_path / "int8" / "adapter.safetensors")
    load_run(config.out)  # what lies beside the weights is none of them
    file = tmp_path / "int8" / "model.safetensors"
    was, weights = file.read_bytes(), load_file(file)
    name = next(name for name, value in weights.items() if value.dtype is torch.int8 and "down_proj" in name)
    save_file(weights | {name: weights[name].roll(1, 0)}, file, {"format": "pt"})
    with pytest.raises(RunError, match=r"int8 is not the base that .* was trained on, its weights are others: bring"):
        load_run(config.out)
    file.write_bytes(was)
    load_run(config.out)
