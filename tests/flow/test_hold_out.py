"""A category held out of training: what still knows it, what does not, and what the gate makes of it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from smartmops.evaluation.measure import choices, gates, mean_weights, weights
from smartmops.flow import steps
from smartmops.flow.compare import CompareConfig, compare
from smartmops.flow.trainer import TrainConfig, train
from smartmops.preparing.adapting import adapt
from smartmops.reading.task import Task
from smartmops.runs.folder import Run

Make = Callable[..., TrainConfig]


@pytest.fixture(scope="session")
def three_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 examples of tasks "a", "b" and "c"; answers of "c" are those of "b"."""
    file = tmp_path_factory.mktemp("data") / "three.jsonl"
    rows = [
        {"instruction": f"{word} number {i}.", "response": answer * 4, "category": word[0]}
        for i in range(20)
        for word, answer in (("apple", "A"), ("banana", "B"), ("cherry", "B"))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_held_out_category_is_tested_and_never_trained_on(config: Make, three_tasks: Path) -> None:
    whole, part = (Task.load(config(data=str(three_tasks), hold_out=category, experts=experts))
                   for category, experts in ((None, 3), ("c", 2)))  # fmt: skip
    assert part.test == whole.test and part.test_examples == whole.test_examples
    assert part.train == [row for row in whole.train if row.category != "c"]
    assert {example.category for example in part.train_examples} == {"a", "b"}


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_shows_what_an_unseen_task_gains(config: Make, three_tasks: Path, tmp_path: Path, seed: int) -> None:
    chosen = config(data=str(three_tasks), hold_out="c", steps=30, prompt_lr=0.3, seed=seed)
    metrics = train(chosen)
    run = Run.open(chosen.out)
    gates = run.read_gates()
    assert gates is not None and gates["experts"] == ["a", "b"]
    for stage in ("before", "after"):
        assert set(gates[stage]) == {"a", "b", "c"}
    assert metrics["gate_pretraining_accuracy"] == 1 and metrics["examples"] == {
        "train": 36,
        "validation": 0,
        "test": 6,
    }
    seen = train(dataclasses.replace(chosen, hold_out=None, experts=3, out=tmp_path / "seen"))
    assert metrics["perplexity_frozen"] == seen["perplexity_frozen"]
    assert seen["perplexity"]["per_task"]["c"] < 0.95 * metrics["perplexity"]["per_task"]["c"], "the unseen is harder"
    gate = metrics["gate"]
    assert [gate[task]["nearest"] for task in ("a", "b")] == ["a", "b"]
    assert gate["c"]["nearest"] == gates["experts"][int(gates["after"]["c"][1] > 0.5)]
    assert all(0 <= each["entropy"] <= math.log(2) + 1e-6 for each in gate.values())


@pytest.mark.parametrize(("hold_out", "names"), [(None, ["a", "b", "c"]), ("c", ["a", "b"])])
def test_by_default_each_task_that_is_trained_on_has_an_expert(
    config: Make, three_tasks: Path, hold_out: str | None, names: list[str]
) -> None:
    chosen = config(data=str(three_tasks), experts=None, hold_out=hold_out, steps=1)
    train(chosen)
    gates = Run.open(chosen.out).read_gates()
    assert gates is not None and gates["experts"] == names


def test_by_default_the_methods_that_are_compared_have_as_many_experts_as_tasks(
    config: Make, three_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    def watched(*given: Any) -> Any:
        made = adapt(*given)
        counts.append(made[0].peft_config["default"].num_experts)
        return made

    monkeypatch.setattr(steps, "adapt", watched)
    given = dataclasses.asdict(config(data=str(three_tasks), experts=None, steps=1))
    compare(CompareConfig(**given | {"seeds": (0,), "methods": {"mops": None, "oracle": None}}))
    assert counts == [3, 3]


def test_entropy_is_a_mean_over_instructions_of_the_same_weights_as_the_gates(config: Make, two_tasks: Path) -> None:
    task = Task.load(config())
    model, names, _ = adapt(task, config(), config(gate_pretraining_steps=3), 0)
    found = weights(task, model)
    assert mean_weights(task.test, found) == gates(task, model)
    for name, said in choices(task.test, found, names).items():
        own = found[[row.category == name for row in task.test]].double()
        assert said["entropy"] == pytest.approx(float(-(own * own.log()).sum(-1).mean()), rel=1e-5)
        assert said["entropy"] < -float((own.mean(0) * own.mean(0).log()).sum()) + 1e-9, "below that of the mean"
    halves = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(len(task.test) // 2, 1)
    assert all(found["entropy"] == 0 for found in choices(task.test, halves, names).values())
    kept = choices(task.test, halves * 0.3, names)
    assert all(found["entropy"] == pytest.approx(0, abs=1e-6) for found in kept.values()), "top-1 keeps less than one"


@pytest.mark.parametrize(("method", "entropy"), [("uniform-gate", math.log(2)), ("oracle", 0.0)])
def test_gates_that_nobody_trains(config: Make, method: str, entropy: float) -> None:
    gate = train(config(method=method, steps=2))["gate"]
    assert [each["entropy"] for each in gate.values()] == [pytest.approx(entropy, abs=1e-6)] * 2
    assert gate["a"]["nearest"] == "a" and (method != "oracle" or gate["b"]["nearest"] == "b")


def test_one_group_of_prompts_has_no_gate_to_speak_of(config: Make) -> None:
    assert "gate" not in train(config(method="prompt-tuning", steps=1))


def test_what_cannot_be_held_out_is_refused(config: Make, three_tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--hold-out d is no category .*: choose one of \['a', 'b', 'c'\]"):
        Task.load(config(data=str(three_tasks), hold_out="d"))
    lone = tmp_path / "lone.jsonl"
    rows = [{"instruction": f"Count {i}.", "response": "one", "category": "a"} for i in range(12)]
    lone.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="--hold-out a is the only category"):
        Task.load(config(data=str(lone), hold_out="a"))
    with pytest.raises(ValueError, match="--method oracle is told the task, but 'c' is in no training example"):
        train(config(data=str(three_tasks), hold_out="c", method="oracle"))


def test_tasks_that_nothing_tests_are_named(
    config: Make, three_tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Task.load(config(data=str(three_tasks), experts=3))
    assert "no test example" not in capsys.readouterr().out
    lone = tmp_path / "lone.jsonl"
    more = [{"instruction": f"Say {name}.", "response": name, "category": name} for name in ("pear", "fig")]
    lone.write_text(three_tasks.read_text() + "".join(json.dumps(row) + "\n" for row in more))
    task = Task.load(config(data=str(lone), experts=5))
    assert {row.category for row in task.test} == {"a", "b", "c"}
    said = " ".join(capsys.readouterr().out.split())
    assert "no test example for 2 of the tasks, which have one example each" in said
    assert "to train on: fig, pear train:" in said


def test_compare_refuses_what_only_train_measures(config: Make, three_tasks: Path) -> None:
    def several(**changes: object) -> CompareConfig:
        return CompareConfig(**dataclasses.asdict(config(data=str(three_tasks))) | changes)  # type: ignore[arg-type]

    for name in ("answers_per_task", "interference_examples"):
        with pytest.raises(
            ValueError, match=f"--{name.replace('_', '-')} 2, but compare does not measure that: use train"
        ):
            compare(several(**{name: 2}))
    with pytest.raises(ValueError, match="--hold-out c leaves no solved examples of that task for --shots 4"):
        compare(several(hold_out="c"))
    found = compare(several(hold_out="c", shots=0, methods={"mops": 0.2}))
    assert set(found["per_task"]["mops"]) == {"a", "b", "c"}
