"""Central training: data, base and method in, run folder out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smartmops.checks.errors import Diverged
from smartmops.evaluation.answers import questions, score
from smartmops.evaluation.interference import interference
from smartmops.evaluation.measure import choices
from smartmops.evaluation.perplexity import Evaluation
from smartmops.fitting.stages import Stages
from smartmops.methods.baselines import trained_numbers
from smartmops.options.training import TrainConfig
from smartmops.reading.task import Task, same_inputs
from smartmops.runs import ranks
from smartmops.runs.card import keep, number
from smartmops.runs.checkpoints import rewound
from smartmops.runs.folder import Run
from smartmops.runs.progress import Phases

from .steps import Adapted, adapted, begun, fitted, opened, shown

__all__ = ["TrainConfig", "train"]


def train(config: TrainConfig) -> dict[str, Any]:
    """Train one method on one data set and write the run folder; returns what `metrics.json` holds.

    Raises:
        BlockingIOError, FileExistsError, FileNotFoundError: as `steps.begun`.
        ValueError: data, options or base do not fit, or with `resume` are others than at the start; the message names
            value, limit and way out.
        Diverged: the loss is not finite; the last good adapter is in `out`/adapter.
    """
    ranks.join()
    with begun("train", config, config.method, seed=config.seed) as run:
        return ranks.first_does(run.read_metrics) or _train(config, run)


def _train(config: TrainConfig, run: Run) -> dict[str, Any]:
    """`train`, in a run that is not finished."""
    phases = Phases()
    with phases("prepare"):
        task, config = opened(config)
        same_inputs(run, task, config.unrelated)
        asked = _asked(config, task)
    made, frozen = adapted(task, config, phases=phases)
    with phases("prepare"):
        stages = Stages(run, made.task, made.model, made.names) if len(made.names) > 1 else None
        wants = config.interference_examples and config.traits.ours
        pulled = ranks.first_does(interference, made.task, made.model, config.interference_examples) if wants else {}
        checkpoint = ranks.first_does(rewound, run)
    with phases("train"):
        said = _fitted(config, run, made, frozen.validation, checkpoint, stages)
    with phases("evaluate"):
        after = made.measured(made.task.test)
    assert math.isfinite(after.overall)
    gained = said.get("gained", after.overall < frozen.test.overall)
    metrics = after.metrics() | said | _beside(made, frozen.test, gained) | config.measured_on
    with ranks.turn() as mine:
        if mine:
            with phases("evaluate"):
                metrics |= _more(config, run, made, asked, pulled, stages, is_open=said.get("gained", True))
            metrics["seconds"] = phases.seconds
            number(run, task.template, metrics)
            run.write_metrics(metrics)
    return ranks.shared(metrics)


def _fitted(
    config: TrainConfig, run: Run, made: Adapted, marks: Evaluation | None, checkpoint: Path | None,
    stages: Stages | None,
) -> dict[str, Any]:  # fmt: skip
    """`fitted`; its curve and the adapter it ends with go into the run folder, even where the loss diverges."""
    write, template = ranks.only_first(run.append_curve), made.task.template
    try:
        said = fitted(made, config, run.checkpoints, write, marks, checkpoint, stages.halfway if stages else None)
    except Diverged as error:
        ranks.first_does(keep, run, made.model, template)
        raise Diverged(f"{error}; the last good adapter is in {run.adapter_dir}") from None
    ranks.first_does(keep, run, made.model, template)
    return said


def _beside(made: Adapted, frozen: Evaluation, gained: bool) -> dict[str, Any]:
    """What a run's perplexity is to be read beside: the frozen base's, and how much was trained on how much."""
    return {
        "perplexity_frozen": frozen.metrics()["perplexity"],
        "gained": gained,
        "trainable_parameters": trained_numbers(made.model),
        "examples": made.task.counts,
        "gate_pretraining_accuracy": made.accuracy,
    }


def _asked(config: TrainConfig, task: Task) -> list[int]:
    """Numbers of the test examples whose answers are to be scored."""
    if not config.answers_per_task:
        return []
    return questions(task.base, task.tokenizer, task.test_examples, config.answers_per_task, config.answer_tokens,
                     task.template)  # fmt: skip


def _more(
    config: TrainConfig, run: Run, made: Adapted, asked: Sequence[int], pulled: dict[str, Any], stages: Stages | None,
    is_open: bool,
) -> dict[str, Any]:  # fmt: skip
    """What is measured beside perplexity, and samples; `pulled` is the `interference` before training.

    An adapter that is closed, since nothing was gained, passes no gradient to its prompts.
    """
    task, model, found = made.task, made.model, dict[str, Any]()
    if asked:
        examples, rows = [task.test_examples[i] for i in asked], [task.test[i] for i in asked]
        found["answers"] = score(model, task.tokenizer, examples, rows, config.answer_tokens, task.template)
    if pulled:
        found["interference"] = {"before": pulled} | (
            {"after": interference(task, model, config.interference_examples)} if is_open else {}
        )
    if stages:
        weights = stages.write("after")
        if is_open:
            found["gate"] = choices(task.test, weights, made.names)
    shown(run, task, model, config)
    return found
