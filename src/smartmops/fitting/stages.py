"""What the gate does before, halfway through and after training, as `gates.json` holds it.

Knows a task, a model of ours and a run folder. Knows no loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from smartmops.evaluation.measure import gates, mean_weights, weights
from smartmops.preparing import gating
from smartmops.reading.task import Task
from smartmops.runs import ranks
from smartmops.runs.folder import Run


class Stages:
    """Mean gate weights of each task's test instructions; made before training, which is the first stage.

    Args:
        names: What each expert is meant for, in order.
    """

    def __init__(self, run: Run, task: Task, model: Any, names: Sequence[str]) -> None:
        self.run, self.task, self.model, self.names = run, task, model, names
        self.before = gates(task, model)

    def halfway(self) -> None:
        """Take note of it halfway through training; the first process alone does."""
        with ranks.turn() as mine:
            if mine:
                self.write("during")

    def write(self, stage: str, **more: Any) -> Float[Tensor, "test experts"]:
        """Write what the gate does at this stage, and more that is known of it; the weights that it was taken from."""
        found = weights(self.task, self.model)
        said = {"experts": self.names, "before": self.before, stage: mean_weights(self.task.test, found)}
        self.run.write_gates((self.run.read_gates() or {}) | said | {"left_to_base": gating.leaves(self.model)} | more)
        return found
