"""What a checkpoint holds beside the Trainer's own: the best state on validation data, and earlier gradient norms.

Knows tensors and one file. Knows no loop, no data and no base.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FILE = "kept.safetensors"
WINDOW = 50  # gradient norms of which the median is taken


def state_of(model: Any) -> dict[str, Tensor]:
    """Copies of the trained parameters, by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def put_state(model: Any, state: dict[str, Tensor]) -> None:
    """Write what `state_of` returned back into the model."""
    for name, parameter in model.named_parameters():
        if name in state:
            parameter.copy_(state[name])


@dataclass
class Kept:
    """Grows with a run, and travels in its checkpoints.

    Attributes:
        step: Optimiser steps of the best state; None before the first evaluation.
        perplexity: Of the best state, on validation data.
        waited: Evaluations since then.
        norms: Gradient norms of the latest steps, before they were clipped.
        losses: Of the steps since the last log, which a resumed run would else log the mean of without them.
        best: The best state, as `state_of` returns it.
        last: Optimiser steps at the latest evaluation.
    """

    step: int | None = None
    perplexity: float = math.inf
    waited: int = 0
    norms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    last: int = 0

    def see(self, step: int, perplexity: float, model: Any) -> None:
        """Take note of an evaluation; of equals, the earlier state stays the best."""
        self.waited, self.last = self.waited + 1, step
        if perplexity < self.perplexity:
            self.step, self.perplexity, self.waited, self.best = step, perplexity, 0, state_of(model)

    def clip(self, parameters: Iterable[torch.nn.Parameter], multiple: float) -> None:
        """Cut gradients down to `multiple` times the median norm of earlier steps.

        Adam's updates do not depend on the scale of the loss, and neither does this. A norm that is zero or not finite
        says nothing of the usual size, so it is neither clipped nor remembered.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm) or norm == 0:
            return
        limit = multiple * median(self.norms) if self.norms else norm
        if norm > limit:
            torch._foreach_mul_(gradients, limit / norm)
        self.norms = [*self.norms, norm][-WINDOW:]

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint."""
        words = {name: getattr(self, name) for name in ("step", "perplexity", "waited", "last", "norms", "losses")}
        tensors = {name: value.cpu().contiguous() for name, value in self.best.items()}
        save_file(tensors or {"": torch.zeros(1)}, folder / FILE, {"kept": json.dumps(words)})

    @classmethod
    def load(cls, folder: Path) -> Kept:
        """From a checkpoint; a fresh one where the checkpoint has none."""
        if not (folder / FILE).is_file():
            return cls()
        with safe_open(folder / FILE, framework="pt") as opened:
            words = json.loads(opened.metadata()["kept"])
            return cls(**words, best={name: opened.get_tensor(name) for name in opened.keys() if name})  # noqa: SIM118
