"""From what decides (rows of the gate, and rules of experts added later) to a weight for each expert.

An expert that is added to a trained gate gets no row in its softmax: a new score would change every weight. It gets a
rule of its own. With g the softmax over the gate's rows, and h_1, ..., h_c the rules in the order of adding, the
weights for an instruction are

    w = one-hot of expert c          where h_c holds,
        what they were before c came where it does not,

and so on down to g. A rule measures how unlike the added expert's own instructions a text is, as the null expert does
for all tasks together (`null.py`): h holds where

    max(cut[1] * (novelty - cut[0]), direction . a - cut[2]) < cut[3].

Where no rule holds, the weights are the same numbers as before, bit for bit, and nobody sees the added experts'
columns; where one holds, nothing is left to the base. Several rows or rules may lead to one expert (two experts that
were merged): the weights of rows add up. Knows tensors only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from . import null


def unlikeness(
    features: Float[Tensor, "n inputs"],
    basis: Float[Tensor, "rank inputs"],
    centre: Float[Tensor, " rank"],
    direction: Float[Tensor, " inputs"],
    cut: Float[Tensor, " four"],
) -> Float[Tensor, " n"]:
    """What a rule compares with its limit `cut[3]`, of standardised instructions."""
    far = cut[1] * (null.novelty(features, basis, centre[None]) - cut[0])
    return torch.maximum(far, features @ direction - cut[2])


def held(
    features: Float[Tensor, "n inputs"],
    basis: Float[Tensor, "claims rank inputs"],
    centres: Float[Tensor, "claims rank"],
    directions: Float[Tensor, "claims inputs"],
    cuts: Float[Tensor, "claims four"],
) -> Bool[Tensor, "n claims"]:
    """Which rules hold for which instructions. A limit of -inf never does."""
    each = [unlikeness(features, *rule) < rule[-1][3] for rule in zip(basis, centres, directions, cuts, strict=True)]
    return torch.stack(each, -1)


def log_weights(
    rows: Float[Tensor, "n rows"], holds: Bool[Tensor, "n claims"] | None, routes: Sequence[int], experts: int
) -> Float[Tensor, "n experts"]:
    """Log weight of each expert, from the log weights of the gate's rows and the rules that hold; the last one wins.

    `routes` names the expert that each row, and then each rule, leads to.
    """
    count, lowest = rows.shape[1], torch.finfo(rows.dtype).min
    found = []
    for expert in range(experts):
        own = [row for row in range(count) if routes[row] == expert]
        none = torch.full_like(rows[:, 0], lowest)
        found.append(none if not own else rows[:, own[0]] if len(own) == 1 else rows[:, own].logsumexp(-1))
    logs = torch.stack(found, -1)
    for claim, expert in enumerate(routes[count:]):
        assert holds is not None
        alone = torch.full_like(logs, lowest).index_fill(1, torch.tensor([expert], device=logs.device), 0.0)
        logs = torch.where(holds[:, claim, None], alone, logs)
    return logs
