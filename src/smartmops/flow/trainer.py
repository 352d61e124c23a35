"""Central training: data, base and method in, run folder out."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from smartmops.checks.errors import Diverged
from smartmops.checks.limits import check
from smartmops.checks.lock import alone
from smartmops.evaluation.answers import questions, score
from smartmops.evaluation.interference import interference
from smartmops.evaluation.measure import choices, gates, mean_weights, measured, weights
from smartmops.evaluation.perplexity import Evaluation, samples
from smartmops.fitting.kept import Kept, state_of
from smartmops.fitting.loop import fit
from smartmops.fitting.validation import settle, spacing
from smartmops.options.training import Schedule, TrainConfig
from smartmops.preparing import gating
from smartmops.preparing.adapting import adapt, recovered
from smartmops.preparing.selection import told
from smartmops.reading.task import Task
from smartmops.runs import ranks
from smartmops.runs.card import keep, number
from smartmops.runs.folder import Run, check_adapter
from smartmops.runs.progress import Phases
from smartmops.states.fingerprint import inputs_of

__all__ = ["Diverged", "Schedule", "TrainConfig", "fit", "last_checkpoint", "learn", "train"]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; one torn by a kill (no `trainer_state.json`, which comes last) is removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    while found:
        try:
            json.loads((found[-1] / "trainer_state.json").read_text())
            check_adapter(found[-1])
            return found[-1]
        except (OSError, ValueError):
            shutil.rmtree(found.pop())
    return None


def learn(
    task: Task, model: Any, config: TrainConfig, folder: Path, write: Callable[[dict[str, Any]], None],
    frozen: Evaluation | None, checkpoint: Path | None = None, halfway: Callable[[], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train the adapter and keep the best state, or the base where `frozen`, its validation, is better than all.

    Returns:
        What validation says, as `metrics.json` holds it; empty without `frozen`.
    """
    start = state_of(model)

    def look() -> Evaluation:
        return measured(task, model, task.validation)

    schedule = replace(config, eval_every=spacing(config, len(task.validation), ranks.world()))
    kept: Kept = fit(model, config, schedule, *task.feed(model), folder, write, look if frozen else None, checkpoint,
                     halfway)  # fmt: skip
    return settle(model, kept, start, frozen.overall, len(task.validation)) if frozen else {}


def train(config: TrainConfig) -> dict[str, Any]:
    """Train one method on one data set and write the run folder; returns what `metrics.json` holds.

    Raises:
        BlockingIOError: another process writes `out`.
        FileExistsError: `out` holds a run already and `resume` is off.
        FileNotFoundError: `resume` is on and there is no `out`.
        ValueError: data, options or base do not fit, or with `resume` are others than at the start; the message names
            value, limit and way out.
        Diverged: the loss is not finite; the last good adapter is in `out`/adapter.
    """
    ranks.join()
    ranks.first_does(lambda: check(config))
    with ExitStack() as held:
        ranks.first_does(lambda: held.enter_context(alone(config.out)))
        return _train(config)


def _train(config: TrainConfig) -> dict[str, Any]:
    """`train`, alone in the run folder."""
    run, metrics = ranks.first_does(lambda: _begin(config))
    if metrics:
        return metrics
    phases = Phases()
    with phases("prepare"):
        task = recovered(Task.load(config), config)
        ranks.first_does(lambda: run.same_inputs(inputs_of(task)))
        asked = _asked(config, task)
    traits = config.traits
    shared = config.expert_kind == "keys_values" and traits.ours and task.recovery is None
    shared = shared and not traits.told and ranks.world() == 1  # then the base's states serve both
    if not shared:
        with phases("evaluate"):
            frozen, marks = (_of(task, task.base, rows, True) for rows in (task.test, task.validation))
    with phases("prepare"):
        task = told(task, config, config.seed)
        model, names, accuracy = adapt(task, config, config, config.seed)
    if shared:
        with phases("evaluate"), gating.closed(model):
            frozen, marks = (_of(task, model, rows, False) for rows in (task.test, task.validation))
    assert frozen is not None
    with phases("prepare"):
        before = gates(task, model) if len(names) > 1 else {}
        pulled = ranks.first_does(lambda: _pulled(config, task, model))
        checkpoint = ranks.first_does(lambda: _rewound(run))

    def halfway() -> None:
        stages = {"experts": names, "before": before, "during": gates(task, model)}
        run.write_gates(stages | {"left_to_base": gating.leaves(model)})

    middle = (lambda: ranks.first_does(halfway)) if before else None
    with phases("train"):
        said = _learned(run, task, model, config, marks, checkpoint, middle)
    with phases("evaluate"):
        after = _of(task, model, task.test, not shared)
    assert after is not None
    assert math.isfinite(after.overall)
    metrics = after.metrics() | said | _beside(task, model, frozen, said.get("gained", after.overall < frozen.overall))
    metrics["gate_pretraining_accuracy"] = accuracy

    def finish() -> dict[str, Any]:
        with phases("evaluate"):
            found = metrics | _measured(config, task, model, asked, pulled)
            if before:
                found |= _gates(run, task, model, names, before, not said or said["gained"])
            speaks = task.embedder is None and traits.answers
            if speaks and config.samples_per_task:
                run.write_samples(
                    samples(model, task.tokenizer, task.test_examples, config.samples_per_task, task.template)
                )
        found["seconds"] = phases.seconds
        number(run, task.template, found)
        run.write_metrics(found)
        return found

    return ranks.first_does(finish)


def _learned(run: Run, task: Task, model: Any, config: TrainConfig, marks: Evaluation | None, checkpoint: Path | None,
             halfway: Callable[[], None] | None) -> dict[str, Any]:  # fmt: skip
    """`learn`; its curve and the adapter it ends with are written into the run folder, even where the loss diverges."""
    try:
        write = ranks.only_first(run.append_curve)
        said = learn(task, model, config, run.checkpoints, write, marks, checkpoint, halfway)
    except Diverged as error:
        ranks.first_does(lambda: keep(run, model, task.template))
        raise Diverged(f"{error}; the last good adapter is in {run.adapter_dir}") from None
    ranks.first_does(lambda: keep(run, model, task.template))
    return said


def _beside(task: Task, model: Any, frozen: Evaluation, gained: bool) -> dict[str, Any]:
    """What a run's perplexity is to be read beside: the frozen base's, and how much was trained on how much."""
    return {
        "perplexity_frozen": frozen.metrics()["perplexity"],
        "gained": gained,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "examples": {"train": len(task.train), "validation": len(task.validation), "test": len(task.test)},
    }


def _of(task: Task, model: Any, rows: Sequence[Any], whole: bool) -> Evaluation | None:
    """`measured`; None where there are no rows."""
    return measured(task, model, rows, progress=True, whole=whole) if rows else None


def _gates(
    run: Run, task: Task, model: Any, names: Sequence[str], before: dict[str, list[float]], is_open: bool
) -> dict[str, Any]:
    """Write what the gate does after training; how decided it is, where it is open."""
    found = weights(task, model)
    stages = {"experts": names, "before": before, "after": mean_weights(task.test, found)}
    run.write_gates((run.read_gates() or {}) | stages | {"left_to_base": gating.leaves(model)})
    return {"gate": choices(task.test, found, names)} if is_open else {}


def _asked(config: TrainConfig, task: Task) -> list[int]:
    """Numbers of the test examples whose answers are to be scored."""
    if not config.answers_per_task:
        return []
    return questions(task.base, task.tokenizer, task.test_examples, config.answers_per_task, config.answer_tokens,
                     task.template)  # fmt: skip


def _pulled(config: TrainConfig, task: Task, model: Any) -> dict[str, Any]:
    """How the tasks' gradients on the prompts agree at present; empty where not asked for, or where there are none."""
    if not config.interference_examples or not config.traits.ours:
        return {}
    return interference(task, model, config.interference_examples)


def _measured(
    config: TrainConfig, task: Task, model: Any, asked: Sequence[int], pulled: dict[str, Any]
) -> dict[str, Any]:
    """What was asked for beside perplexity; `pulled` is what `_pulled` found before training."""
    found: dict[str, Any] = {}
    if asked:
        examples, rows = [task.test_examples[i] for i in asked], [task.test[i] for i in asked]
        found["answers"] = score(model, task.tokenizer, examples, rows, config.answer_tokens, task.template)
    if pulled:
        found["interference"] = {"before": pulled, "after": _pulled(config, task, model)}
    return found


def _begin(config: TrainConfig) -> tuple[Run, dict[str, Any]]:
    """The run, and its metrics where it is finished."""
    run = Run.create(
        config.out,
        {"command": "train", "arguments": asdict(config), "seed": config.seed, "base": config.model,
         "data": config.data, "method": config.method},
        config.resume,
    )  # fmt: skip
    return run, run.read_metrics()


def _rewound(run: Run) -> Path | None:
    """The checkpoint to go on from; what was logged after it is discarded."""
    checkpoint = last_checkpoint(run.checkpoints)
    run.rewind(int(checkpoint.name.split("-")[1]) if checkpoint else 0)
    return checkpoint
