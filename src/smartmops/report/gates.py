"""What the gate did: tables of mean gate weights, task by expert, and how decided they are.

Plain data in, plain numbers out. Knows no model and no file; the data is what `gates.json` of a run holds.

A row of a table is the mean of the gate's weights over the examples of one task. Its entropy is therefore that of the
task's average use of the experts: it is high when every example spreads its weight, and also when each example is
decided but they disagree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smartmops.checks.errors import RunError

STAGES = ("before", "during", "after")  # training of prompts and gate, in order of time
_ROUNDING = 0.05  # how far a row of weights written in low precision may sum from 1


@dataclass(frozen=True)
class GateTable:
    """Mean gate weights at one stage.

    Attributes:
        experts: Names of the columns.
        weights: Per task, one weight per expert; each row sums to 1, less what a null expert left to the base.
    """

    experts: tuple[str, ...]
    weights: dict[str, tuple[float, ...]]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the rows."""
        return tuple(self.weights)


def entropy(weights: Sequence[float]) -> float:
    """Entropy in nats (natural logarithm) of the experts' shares: 0 for one alone, log(E) for E experts used alike."""
    total = math.fsum(weights)
    return math.fsum(-w / total * math.log(w / total) for w in weights if w > 0)


def experts_used(weights: Sequence[float]) -> float:
    """Effective number of experts, exp(entropy): 1 for one expert alone, E for E used alike, 0 where all is left."""
    return math.exp(entropy(weights)) if any(weights) else 0.0


def own_weights(table: GateTable) -> dict[str, float]:
    """Weight each task gives to the expert of its own name; empty unless every task has one."""
    if not set(table.tasks) <= set(table.experts):
        return {}
    return {task: row[table.experts.index(task)] for task, row in table.weights.items()}


def mean_entropy(table: GateTable) -> float:
    """Mean over tasks of the entropy of their rows, in nats."""
    return math.fsum(map(entropy, table.weights.values())) / len(table.weights)


def tables(gates: Mapping[str, Any]) -> dict[str, GateTable]:
    """Tables of `gates.json` by stage, in order of time; tasks and experts stand in one order throughout.

    Args:
        gates: `{"experts": [name], "before": {task: [weight per expert]}, "after": {...}}`; a stage may be missing.
            With `left_to_base`, rows may sum to less than 1.

    Raises:
        RunError: A row has a weight too many or too few, a negative or missing weight, or does not sum to 1.
    """
    experts = tuple(map(str, gates.get("experts", ())))
    found = {stage: gates[stage] for stage in STAGES if gates.get(stage)}
    order = list(dict.fromkeys(task for rows in found.values() for task in rows))
    least = 0.0 if gates.get("left_to_base") else 1 - _ROUNDING
    return {
        stage: GateTable(experts, {task: _checked(f"gates.json, {stage}.{task}", rows[task], experts, least)
                                   for task in order if task in rows})
        for stage, rows in found.items()
    }  # fmt: skip


def _checked(where: str, row: Sequence[float | None], experts: Sequence[str], least: float) -> tuple[float, ...]:
    if len(row) != len(experts):
        raise RunError(f"{where} has {len(row)} weights for {len(experts)} experts: write one weight per expert")
    weights = tuple(float(w) for w in row if w is not None and 0 <= w <= 1 + _ROUNDING)
    if len(weights) != len(row):
        raise RunError(f"{where}={list(row)} has a weight outside 0 to 1: write gate weights, not scores")
    if not least <= (total := math.fsum(weights)) <= 1 + _ROUNDING:
        short = "more than" if total > 1 else "not"
        raise RunError(f"{where} sums to {total:.3g}, {short} 1: write the mean of softmax weights")
    return weights
