"""Several methods in one sitting: the same data for each, the base untouched in between, every seed's number kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from smartmops.flow.compare import CompareConfig, compare, shots_of
from smartmops.flow.trainer import TrainConfig, train
from smartmops.reading.task import Task
from smartmops.runs.folder import Run

Make = Callable[..., TrainConfig]


def several(config: TrainConfig, **changes: object) -> CompareConfig:
    return CompareConfig(**dataclasses.asdict(config) | {"methods": {"prompt-tuning": 0.3, "mops": 0.2}} | changes)  # type: ignore[arg-type]


def test_a_method_in_company_gets_what_it_gets_alone(config: Make, tmp_path) -> None:
    chosen = several(config(out=tmp_path / "both"), seeds=(0, 1))
    metrics = compare(chosen)
    alone = train(config(out=tmp_path / "alone", method="mops", prompt_lr=0.2))
    assert metrics["per_seed"]["mops"][0] == pytest.approx(alone["perplexity"]["overall"], rel=1e-6)
    assert metrics["perplexity"]["frozen"] == pytest.approx(alone["perplexity_frozen"]["overall"], rel=1e-6)
    for method in ("ungated", "mops"):
        assert metrics["perplexity"][method] == pytest.approx(sum(metrics["per_seed"][method]) / 2)
        assert len(metrics["seconds"][method]) == 2
    told = (chosen.out / "adapter" / "README.md").read_text()
    assert f"| {metrics['perplexity']['mops']:.2f} |\n\nMeans over seeds 0, 1" in told


def test_a_pruned_base_is_kept_with_the_run_and_the_adapter_loads_on_it(config: Make) -> None:
    from smartmops.methods.baselines import load_run

    chosen = several(config(), sparsity=0.5)
    compare(chosen)
    model, _, run = load_run(chosen.out)
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.weight
    assert (weight == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    rows = Run.open(chosen.out).read_curves()
    assert {(row["method"], row["seed"]) for row in rows} == {("ungated", 0), ("mops", 0)}
    assert run.read_gates() is not None


def test_a_task_with_fewer_examples_than_shots_shows_all_it_has(config: Make) -> None:
    task = Task.load(config())
    few = [example for example in task.train_examples if example.category == "a"][:2]
    task = dataclasses.replace(
        task, train_examples=[*few, *(each for each in task.train_examples if each.category == "b")]
    )
    rows = shots_of(task, 4, 4000)
    assert {row.shots for row in rows if row.category == "a"} == {2}
    assert {row.shots for row in rows if row.category == "b"} == {4}


def test_shots_are_solved_training_examples_of_the_same_task(config: Make) -> None:
    task = Task.load(config(max_length=250))
    for row, example in zip(shots_of(task, 2, 250), task.test_examples, strict=True):
        text = task.tokenizer.decode(row.input_ids)
        assert row.shots == 2 and text.count("### Response:") == 3
        assert text.count(example.response) == 3, "answers of one task are alike in this data"
