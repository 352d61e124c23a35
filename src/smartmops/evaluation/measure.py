"""What is measured of a model on a task's rows: perplexity, from states of the frozen half, and the gate's choices.

Knows a task and its states. Trains nothing, writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from smartmops.experts.gate import by_expert
from smartmops.reading.task import Task
from smartmops.runs import ranks
from smartmops.tokens.batches import Encoded
from smartmops.tuner import MoPsModel

from .perplexity import Evaluation, evaluate


def measured(
    task: Task, model: Any, rows: Sequence[Encoded] | None = None, progress: bool = False, whole: bool = False
) -> Evaluation:
    """Perplexity on the test split, or on `rows`; every process takes its part, and all return the whole.

    A model of ours runs its upper half only, from the second time on; unless by `whole` passes, which leave nothing in
    memory.

    Raises:
        DataError: there are no rows.
    """
    rows = task.test if rows is None else rows
    own = ranks.part(rows)
    states = not whole and isinstance(getattr(model, "base_model", None), MoPsModel) and own
    cache = task.states.of(model, own) if states else None
    found = evaluate(model, own, task.collator, progress=progress, cache=cache) if own or not rows else None
    parts = [each for each in ranks.all_of(found) if each is not None]
    return parts[0] if len(parts) == 1 else Evaluation.merged(parts)


def weights(task: Task, model: Any) -> Float[Tensor, "test experts"]:
    """Gate weight of each expert for each test instruction."""
    model.eval()
    layer = model.base_model.layer()
    pooled = task.states.read(model, task.test)
    with torch.no_grad():
        return by_expert(layer.gate(pooled, "default"), layer.configs["default"].num_experts)


def gates(task: Task, model: Any) -> dict[str, list[float]]:
    """Mean gate weight of each expert for the test instructions of each task (paper, Figures 5 to 11)."""
    return mean_weights(task.test, weights(task, model))


def mean_weights(rows: Sequence[Encoded], weights: Float[Tensor, "test experts"]) -> dict[str, list[float]]:
    """`gates`, of the weights that `weights` returned for these rows."""
    return {task: own.mean(0).tolist() for task, own in _by_task(rows, weights).items()}


def choices(
    rows: Sequence[Encoded], weights: Float[Tensor, "test experts"], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """How decided the gate is on each task's rows, and for whom, of what `weights` returned for them.

    `entropy`, in nats, is the mean over instructions of -sum(w log w), w being the weights of the experts made to
    sum to one: 0 for one expert alone, log(experts) for all alike. `nearest` is the expert with the highest mean
    weight (of equals the first), by its name in `names` [experts].
    """
    share = weights / weights.sum(-1, keepdim=True)
    entropy = _by_task(rows, torch.special.entr(share).sum(-1))
    return {
        task: {"entropy": entropy[task].mean().item(), "nearest": names[int(own.mean(0).argmax())]}
        for task, own in _by_task(rows, weights).items()
    }


def _by_task(rows: Sequence[Encoded], values: Float[Tensor, "test ..."]) -> dict[str, Float[Tensor, "some ..."]]:
    tasks = sorted({row.category for row in rows})
    return {task: values[[row.category == task for row in rows]] for task in tasks}
