"""Whether the tasks want the same of the prompts they share: the paper's "interference", measured by gradients.

Knows training rows and a MoPs model's prompts. Trains nothing, and leaves parameters and random states as they were.

With P the prompts of all experts, [K, hidden] where they are hidden states, else [K, keys and values of all layers],
and L_t the mean nats over the response tokens of task t's examples:

    g_t = dL_t / dP            cos(s, t) = <g_s, g_t> / (|g_s| |g_t|), over all numbers in P

Two tasks conflict where cos(s, t) < 0: a small step that helps one harms the other (Yu et al. 2020, "Gradient Surgery
for Multi-Task Learning", definition 1). Tasks whose gates open different experts have gradients in different rows of
P, whose cosine is near 0: they neither help nor harm one another. A decided gate leaves so little of another expert
that the sign of a cosine like 1e-14 is an accident, so what float32 cannot tell from 0 counts as no conflict.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from smartmops.attention.packed import Packed
from smartmops.checks.errors import ConfigError
from smartmops.reading.task import Task
from smartmops.states.activations import evaluating
from smartmops.tokens.batches import by_budget

from .perplexity import BUDGET

ROUNDING = 1e-6  # of a cosine between float32 gradients
HIDDEN_STATES, KEYS_VALUES = ("mops_prompts",), ("mops_keys", "mops_values")  # parameters that hold the prompts
SHARED = ("mops_shared_keys", "mops_shared_values")  # and those of keys and values that every row sees


def interference(task: Task, model: Any, count: int) -> dict[str, Any]:
    """How the gradients of the training tasks agree, as `agreement` has it, over `count` examples of each.

    Raises:
        ConfigError: `count` is below 1, or fewer than two tasks are trained on.
    """
    if count < 1:
        raise ConfigError(f"interference_examples={count}: choose 1 or more of each task, or 0 to leave it away")
    names = sorted({row.category for row in task.train})
    if len(names) < 2:
        raise ConfigError(f"interference_examples={count}, but {names} is the only task that is trained on: give data "
                          "of two tasks or more, or leave it away")  # fmt: skip
    return agreement(gradients(task, model, count))


def gradients(
    task: Task, model: Any, count: int, names: Sequence[str] | None = None
) -> dict[str, Float[Tensor, "K numbers"]]:
    """g_t of each training task, tasks in order, over its first `count` examples or as many as it has.

    On the CPU, in float32; no `.grad` is touched, and no dropout is drawn. Of the experts' prompts, or of the
    parameters called `names`, such as `SHARED`.
    """
    chosen: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(task.train):
        if len(chosen[row.category]) < count:
            chosen[row.category].append(i)
    layer = model.base_model.layer()
    own = KEYS_VALUES if layer.configs["default"].experts == "keys_values" else HIDDEN_STATES
    prompts = [getattr(layer, name)["default"] for name in names or own]
    with evaluating(model), torch.enable_grad():
        return {name: _gradient(task, model, prompts, chosen[name]).cpu() for name in sorted(chosen)}


def _gradient(task: Task, model: Any, prompts: Sequence[Tensor], chosen: Sequence[int]) -> Float[Tensor, "K numbers"]:
    rows, collate = task.feed(model)
    total, tokens = torch.zeros(len(prompts[0]), sum(each[0].numel() for each in prompts), device=model.device), 0
    for group in by_budget([len(task.train[i].input_ids) for i in chosen], BUDGET):
        given = collate([rows[chosen[i]] for i in group])["packed"]
        batch = Packed.of({name: value.to(model.device) for name, value in given.items()})
        own = len(batch.targets()[0])
        found = torch.autograd.grad(model(packed=batch).loss, prompts)
        total += own * torch.cat([each.flatten(1) for each in found], 1)
        tokens += own
    return total / tokens


def agreement(found: Mapping[str, Float[Tensor, "K numbers"]]) -> dict[str, Any]:
    """`cosines` of all pairs of tasks, under "task | other task", their mean, and the share that is `conflicting`.

    That is the share below 0 by more than `ROUNDING`. The cosine with a gradient that is zero is 0.
    """
    unit = {name: F.normalize(each.double().flatten(), dim=0) for name, each in found.items()}
    cosines = {f"{one} | {two}": (unit[one] @ unit[two]).item() for one, two in combinations(unit, 2)}
    return {
        "mean_cosine": mean(cosines.values()),
        "cosines": cosines,
        "conflicting": mean(float(value < -ROUNDING) for value in cosines.values()),
    }
