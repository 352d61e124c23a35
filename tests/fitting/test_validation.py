"""The best state on validation data is what a run keeps, through kills too, and the frozen base may be the best."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from smartmops import cli
from smartmops.evaluation import measure
from smartmops.evaluation.perplexity import Evaluation, evaluate
from smartmops.fitting import loop
from smartmops.fitting.kept import state_of
from smartmops.fitting.loop import Schedule
from smartmops.fitting.validation import spacing, verdict
from smartmops.flow import steps
from smartmops.flow.compare import CompareConfig, compare
from smartmops.flow.trainer import TrainConfig, train
from smartmops.methods.baselines import load_run
from smartmops.options.training import ValidationConfig
from smartmops.preparing.adapting import adapt
from smartmops.reading.held_out import hold_out
from smartmops.reading.task import Task
from smartmops.rows.example import Example
from smartmops.runs.folder import Run

Make = Callable[..., TrainConfig]


def examples(**counts: int) -> list[Example]:
    return [Example(f"{task} {i}", "", "answer", task) for task, count in counts.items() for i in range(count)]


def test_each_task_gives_its_share_and_at_least_one_from_five_examples_on() -> None:
    given = examples(a=40, b=9, c=5, d=4)
    kept, held = hold_out(given, ValidationConfig(), 3)
    assert Counter(e.category for e in held) == {"a": 4, "b": 1, "c": 1}
    assert sorted([*kept, *held], key=given.index) == given, "nobody is lost, nobody is in both"
    assert (kept, held) == hold_out(given, ValidationConfig(), 3) and held != hold_out(given, ValidationConfig(), 4)[1]


def test_a_limit_leaves_the_rest_to_training() -> None:
    kept, held = hold_out(examples(a=300, b=100), ValidationConfig(validation_limit=8), 0)
    assert Counter(e.category for e in held) == {"a": 6, "b": 2} and len(kept) == 392
    assert len(hold_out(examples(**{f"t{i}": 5 for i in range(9)}), ValidationConfig(validation_limit=4), 0)[1]) == 4


def test_too_little_data_are_all_trained_on_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    given = examples(a=4, b=3)
    assert hold_out(given, ValidationConfig(), 0) == (given, [])
    assert "validation: none held out, no task has 5 training examples; the last state is kept" in " ".join(
        capsys.readouterr().out.split()
    )
    assert hold_out(given, ValidationConfig(validation_share=0.0), 0) == (given, [])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("steps", "batch_size", "count", "every"),
    [(1000, 16, 200, 100), (150, 4, 90, 37), (40, 4, 200, 13), (2, 1, 5, 1), (8, 4, 0, 8)],
)
def test_evaluations_take_a_fifth_of_the_time_or_come_three_times(
    steps: int, batch_size: int, count: int, every: int
) -> None:
    assert spacing(Schedule(steps=steps, batch_size=batch_size), count, 1) == every
    assert spacing(Schedule(steps=steps, eval_every=7), count, 1) == 7


def test_validation_is_neither_trained_on_nor_tested_on_nor_held_out_of_training_altogether(config: Make) -> None:
    chosen = config(validation_share=0.2, hold_out="b", experts=1)
    task = Task.load(chosen)
    whole = Task.load(config(hold_out="b", experts=1))
    assert {row.category for row in task.validation} == {"a"} and len(task.validation) == 4
    texts = [sorted(tuple(row.input_ids) for row in rows) for rows in (task.train, task.validation, whole.train)]
    assert sorted(texts[0] + texts[1]) == texts[2] and task.test == whole.test


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, dict[str, torch.Tensor]]]:
    """The trained parameters at every step that was evaluated."""
    seen: dict[int, dict[str, torch.Tensor]] = {}
    real = loop.Kept.see

    def see(self: Any, step: int, perplexity: float, model: Any) -> None:
        seen[step] = state_of(model)
        real(self, step, perplexity, model)

    monkeypatch.setattr(loop.Kept, "see", see)
    yield seen


def bare(model: Any) -> bool:
    """Whether it is the base that is measured: without an adapter, or under one that is closed."""
    config = getattr(model, "active_peft_config", None)
    return config is None or getattr(config, "null_threshold", 1.0) <= 0


@pytest.fixture
def turning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation that gets better until the parameters have moved by two steps of Adam at rate 1, and worse then."""
    start: dict[str, torch.Tensor] = {}

    def begins(model: Any) -> dict[str, torch.Tensor]:
        start.clear()
        start.update(state_of(model))
        return dict(start)

    real = steps.measured

    def evaluated(task: Task, model: Any, rows: Any, **kwargs: Any) -> Evaluation:
        if rows is not task.validation or bare(model):
            return real(task, model, rows, **kwargs)
        moved = max(float((value - start[name]).abs().max()) for name, value in state_of(model).items())
        return Evaluation(100 + abs(moved - 2), {"a": 1.0}, {"a": 1})

    monkeypatch.setattr(steps, "state_of", begins)
    monkeypatch.setattr(steps, "measured", evaluated)


@pytest.mark.usefixtures("turning")
@pytest.mark.parametrize("method", ["mops", "lora", "input-prompt-tuning"])
def test_the_adapter_is_the_state_that_was_best_on_validation_data(
    config: Make, states: dict[int, dict[str, torch.Tensor]], method: str
) -> None:
    chosen = config(method=method, steps=16, eval_every=2, prompt_lr=1.0, validation_share=0.2,
                    lr_schedule="constant", warmup=0.0, samples_per_task=0)  # fmt: skip
    metrics = train(chosen)
    rows = [row for row in Run.open(chosen.out).read_curves() if "eval_perplexity" in row]
    assert [row["step"] for row in rows] == list(range(2, 17, 2))
    best = min(rows, key=lambda row: row["eval_perplexity"])
    assert best["step"] < 12
    assert metrics["gained"] and metrics["best"]["step"] == best["step"]
    assert metrics["best"]["validation_perplexity"] == best["eval_perplexity"]
    assert metrics["best"]["validation_examples"] == metrics["examples"]["validation"] == 8
    task = Task.load(chosen)
    frozen = evaluate(task.base, task.validation, task.collator).overall
    assert metrics["best"]["frozen_validation_perplexity"] == pytest.approx(frozen, rel=1e-6)
    kept = load_file(chosen.out / "adapter" / "adapter_model.safetensors")
    trained = list(states[best["step"]].values())
    assert all(any(v.shape == w.shape and torch.equal(v, w) for w in kept.values()) for v in trained)


@pytest.mark.parametrize("method", ["mops", "lora", "input-prompt-tuning"])
def test_what_is_measured_is_the_loaded_adapter_on_the_validation_examples(config: Make, method: str) -> None:
    chosen = config(method=method, steps=6, eval_every=3, prompt_lr=0.1, validation_share=0.2)
    metrics = train(chosen)
    model, _, _ = load_run(chosen.out)
    task = Task.load(chosen)
    found = evaluate(model, task.validation, task.collator).overall
    assert metrics["best"]["validation_perplexity"] == pytest.approx(found, rel=1e-4)


@pytest.mark.usefixtures("turning")
def test_a_killed_run_ends_with_the_same_best_state(config: Make, tmp_path: Path, monkeypatch: Any) -> None:
    """Killed after the best state and two checkpoints, so that it can only come out of one of them."""
    options = {"steps": 16, "eval_every": 2, "prompt_lr": 1.0, "validation_share": 0.2, "lr_schedule": "constant",
               "warmup": 0.0, "save_every": 3}  # fmt: skip
    whole = train(config(out=tmp_path / "whole", **options))
    assert whole["best"]["step"] < 12
    real = loop.Trainer.training_step

    def dies(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 13:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(loop.Trainer, "training_step", dies)
    killed = config(out=tmp_path / "killed", **options)
    with pytest.raises(KeyboardInterrupt):
        train(killed)
    monkeypatch.setattr(loop.Trainer, "training_step", real)
    taken_up = train(config(out=tmp_path / "killed", resume=True, **options))
    assert taken_up | {"seconds": 0} == whole | {"seconds": 0}
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    rows = [Run.open(tmp_path / name).read_curves() for name in ("whole", "killed")]
    assert rows[0] == rows[1]


@pytest.mark.usefixtures("turning")
def test_patience_ends_a_run_that_no_longer_gets_better_and_one_killed_then_is_not_trained_on(
    config: Make, tmp_path: Path, monkeypatch: Any
) -> None:
    chosen = config(steps=40, eval_every=1, patience=3, prompt_lr=1.0, validation_share=0.2, lr_schedule="constant",
                    warmup=0.0, save_every=1)  # fmt: skip
    metrics = train(chosen)
    last = Run.open(chosen.out).last_step()
    assert metrics["best"]["last_step"] == last == metrics["best"]["step"] + 3 and last < 40
    (chosen.out / "metrics.json").unlink()
    chosen.resume = True
    monkeypatch.setattr(loop, "_run", None)
    assert train(chosen) | {"seconds": 0} == metrics | {"seconds": 0}


@pytest.mark.parametrize("method", ["mops", "keys_values", "prompt-tuning", "lora", "ia3", "input-prompt-tuning"])
def test_where_the_frozen_base_is_best_the_run_says_so_and_saves_it(
    config: Make, monkeypatch: Any, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    kind: dict[str, Any] = {"method": "mops", "expert_kind": method} if method == "keys_values" else {"method": method}
    kind |= {} if method in ("mops", "keys_values") else {"gate_lr": None}
    as_by_default = TrainConfig.gate_pretraining_steps  # which only one of these methods takes
    chosen = config(**kind, steps=4, validation_share=0.2, samples_per_task=0, gate_pretraining_steps=as_by_default)
    real = steps.measured

    def worse(task: Task, model: Any, rows: Any, **kwargs: Any) -> Evaluation:
        found = real(task, model, rows, **kwargs)
        if rows is not task.validation or bare(model):
            return found
        return Evaluation(1000.0, found.per_task, found.tokens)

    monkeypatch.setattr(steps, "measured", worse)
    metrics = cli.train_command(chosen)
    assert metrics["gained"] is False and metrics["best"]["step"] == 0
    assert metrics["best"]["validation_perplexity"] == 1000.0
    out = " ".join(capsys.readouterr().out.split())
    assert "Nothing was gained: on 8 validation examples the frozen base has perplexity" in out
    assert "the best trained state 1000.000" in out and "--prompt-lr" in out
    assert json.loads((chosen.out / "metrics.json").read_text())["gained"] is False
    exact = method != "input-prompt-tuning"
    assert metrics["best"]["adapter"] == ("closed" if exact else "untrained")
    assert ("answers as the base does" in out) == exact
    if exact:
        found, frozen = metrics["perplexity"]["overall"], metrics["perplexity_frozen"]["overall"]
        assert found == pytest.approx(frozen, rel=1e-5)
        model, _, _ = load_run(chosen.out)
        task = Task.load(chosen)
        assert evaluate(model, task.test, task.collator).overall == pytest.approx(frozen, rel=1e-5)


@pytest.mark.parametrize("better", [False, True])
def test_without_a_step_what_was_prepared_is_measured_and_decides(
    config: Make, monkeypatch: Any, capsys: pytest.CaptureFixture[str], better: bool
) -> None:
    chosen, real = config(steps=0, validation_share=0.2), steps.measured

    def measured(task: Task, model: Any, rows: Any, **kwargs: Any) -> Evaluation:
        found = real(task, model, rows, **kwargs)
        if rows is not task.validation or bare(model):
            return found
        return replace(found, overall=1.0 if better else 1000.0)

    monkeypatch.setattr(steps, "measured", measured)
    metrics = cli.train_command(chosen)
    assert metrics["gained"] is better and metrics["best"]["adapter"] == ("trained" if better else "closed")
    assert metrics["best"]["validation_perplexity"] == (1.0 if better else 1000.0)
    assert json.loads((chosen.out / "metrics.json").read_text())["best"] == metrics["best"]
    assert " inf" not in capsys.readouterr().out
    same = metrics["perplexity"]["overall"] == pytest.approx(metrics["perplexity_frozen"]["overall"], rel=1e-6)
    assert same != better


def test_the_test_split_is_looked_at_once_frozen_and_once_adapted(config: Make, monkeypatch: Any) -> None:
    seen: list[int] = []
    real = measure.evaluate

    def counted(model: Any, rows: Any, *args: Any, **kwargs: Any) -> Evaluation:
        seen.append(len(rows))
        return real(model, rows, *args, **kwargs)

    monkeypatch.setattr(measure, "evaluate", counted)
    metrics = train(config(steps=6, eval_every=2, validation_share=0.2))
    test, held = metrics["examples"]["test"], metrics["examples"]["validation"]
    assert test == 4 and held == 8
    assert seen == [test, held, held, held, held, test]


def test_no_validation_keeps_the_last_state(config: Make, states: dict[int, Any]) -> None:
    metrics = train(config(steps=4))
    assert "best" not in metrics and not states and metrics["gained"]


def test_seconds_of_each_phase_and_lines_where_stdout_is_no_terminal(
    config: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = train(config(steps=4, validation_share=0.2, eval_every=4))
    assert set(metrics["seconds"]) == {"prepare", "train", "evaluate"}
    assert all(value > 0 for value in metrics["seconds"].values())
    out = capsys.readouterr().out
    assert "preparing ..." in out and "training took" in out and "evaluating took" in out
    assert "step 4 of 4, loss" in out and ", validation perplexity" in out and "0 s left" in out


def test_no_steps_is_what_comes_before_training(config: Make) -> None:
    chosen = config(steps=0)
    metrics = train(chosen)
    model, _, _ = adapt(Task.load(chosen), chosen, chosen, chosen.seed)
    kept = load_file(chosen.out / "adapter" / "adapter_model.safetensors")
    assert all(any(v.shape == w.shape and torch.equal(v, w) for w in kept.values()) for v in state_of(model).values())
    assert metrics["perplexity"]["overall"] > 0


def test_a_verdict_without_validation_is_that_of_the_test_split() -> None:
    def metrics(found: float, **more: Any) -> dict[str, Any]:
        return {"perplexity": {"overall": found}, "perplexity_frozen": {"overall": 5.0}} | more

    assert verdict(metrics(4.0, gained=True)) is None
    said = verdict(metrics(6.0, gained=False))
    assert said and said.startswith("Nothing was gained: on the test split 6.000 against 5.000 frozen.")
    assert said.endswith("or more --steps.") and verdict(metrics(5.0), "--rounds") == said.replace(
        "--steps", "--rounds"
    ).replace("6.000", "5.000")


def test_compare_keeps_each_methods_best_and_says_who_gained(config: Make) -> None:
    settings = dataclasses.asdict(config(validation_share=0.2, steps=6, eval_every=2))
    metrics = compare(CompareConfig(**settings | {"methods": {"prompt-tuning": 0.3, "mops": 0.2}}))
    alone = train(config(validation_share=0.2, steps=6, eval_every=2, prompt_lr=0.2, out=config().out.parent / "one"))
    (mops,) = metrics["validation"]["mops"]
    assert mops["best"]["step"] == alone["best"]["step"] and mops["gained"] == alone["gained"]
    assert metrics["perplexity"]["mops"] == pytest.approx(alone["perplexity"]["overall"], rel=1e-6)
    assert metrics["examples"]["validation"] == 8


def test_validation_holds_out_whole_conversations() -> None:
    said = [Example(f"{n}", "", "a", "c", history=((f"{n}", "a"),) * turn) for n in range(30) for turn in range(3)]
    for limit in (200, 7, 3):
        train, held = hold_out(said, ValidationConfig(validation_share=0.2, validation_limit=limit), 0)
        assert 0 < len(held) <= limit and len(train) + len(held) == 90
        assert not {example.instruction for example in train} & {example.instruction for example in held}
