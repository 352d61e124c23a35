"""How unlike all training instructions a text is, and the weight that therefore goes to no expert.

Features in, weight out. No tasks, no files. A gate is sure of itself on what it never saw too; a distance is not. Where
tasks are broad, other text is no further away than they are from each other, only elsewhere: so a direction that tells
instructions from other text is asked as well, and the surer of the two decides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

RANK = 64  # directions in which distance is measured


def novelty(
    features: Float[Tensor, "n inputs"], basis: Float[Tensor, "rank inputs"], centres: Float[Tensor, "c rank"]
) -> Float[Tensor, " n"]:
    """Log of the squared distance to the nearest centre, where `basis` has made the spread within tasks 1.

    That is a Mahalanobis distance in `rank` directions (Lee et al. 2018, "A simple unified framework for detecting
    out-of-distribution samples").
    """
    placed = features @ basis.T
    squared = (placed[:, None] - centres).pow(2).sum(-1)
    return squared.min(-1).values.clamp(min=1e-12).log()


def weight(
    features: Float[Tensor, "n inputs"],
    basis: Float[Tensor, "rank inputs"],
    centres: Float[Tensor, "c rank"],
    direction: Float[Tensor, " inputs"],
    cut: Float[Tensor, " three"],
    threshold: float,
) -> Float[Tensor, " n"]:
    """Null weight, sigmoid(max(cut[1] * (novelty - cut[0]), direction . features - cut[2])); 1 from `threshold` on.

    Where `cut[0]` and `cut[2]` are infinite it is 0 everywhere.
    """
    far = cut[1] * (novelty(features, basis, centres) - cut[0])
    found = torch.sigmoid(torch.maximum(far, features @ direction - cut[2]))
    return torch.where(found >= threshold, torch.ones_like(found), found)


@dataclass
class Fitted:
    """What `weight` needs, and how well it tells training instructions from other text."""

    basis: Float[Tensor, "rank inputs"]
    centres: Float[Tensor, "c rank"]
    direction: Float[Tensor, " inputs"]
    cut: Float[Tensor, " three"]
    kept: float  # share of held-out training instructions that stay below both cuts
    caught: float  # share of held-out unrelated texts beyond one of them


def fit(
    features: Float[Tensor, "n inputs"],
    task: list[int],
    unrelated: Float[Tensor, "m inputs"],
    rank: int,
    centres: int,
    lose: float = 0.02,
) -> Fitted:
    """Fit distance, direction and cuts: about a share `lose` of new instructions of the tasks falls beyond a cut.

    Half of the instructions and texts place centres, spread and direction, the other half show where new ones lie; the
    cuts are put between the two kinds. Then all of them place centres, spread and direction.

    Args:
        features: Standardised, of training instructions.
        task: Of each, a number below `centres`.
        unrelated: Features of text of no task, standardised by the same mean and scale.
        rank: Directions of the result; what is not needed is 0.
        centres: Of the result.
        lose: Share.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(features), generator=generator)
    # Of each task alternately, so that each is on either side.
    by_task = sorted(order.tolist(), key=lambda i: task[i])
    here, there = by_task[::2], by_task[1::2] or by_task
    basis, placed = _place(features[here], [task[i] for i in here], unrelated[::2], rank, centres)
    far = novelty(features[there], basis, placed), novelty(unrelated[1::2], basis, placed)
    tells = _direction(features[here], unrelated[::2])
    along = features[there] @ tells, unrelated[1::2] @ tells
    distance, side = (_between(*pair, lose / 2, least) for pair, least in ((far, 0.1), (along, 1e-3)))
    beyond = [(f >= distance[0]) | (a >= side[0]) for f, a in zip(far, along, strict=True)]
    basis, placed = _place(features, task, unrelated, rank, centres)
    direction = side[1] * _direction(features, unrelated)
    cut = torch.tensor([*distance, side[0] * side[1]])
    kept, caught = 1 - float(beyond[0].float().mean()), float(beyond[1].float().mean())
    return Fitted(basis, placed, direction, cut, kept, caught)


def _between(known: Float[Tensor, " n"], other: Float[Tensor, " m"], lose: float, least: float) -> tuple[float, float]:
    """A cut between two kinds of numbers, that at most a share `lose` of the known exceeds, and how steep it is."""
    low, high = float(known.quantile(1 - lose)), float(other.quantile(lose))
    middle = (low + high) / 2 if high > low else low
    gap = max(high - low, float(known.std()) if len(known) > 1 else least, least)
    return middle, 8 / gap


def _direction(
    known: Float[Tensor, "n inputs"], unrelated: Float[Tensor, "m inputs"], penalty: float = 3.0
) -> Float[Tensor, " inputs"]:
    """Ridge regression that tells unrelated text (1) from instructions (0), whichever of the two there is more of.

    `penalty` is times the mean squared length of an instruction: of several, the one that caught most held-out
    unrelated texts on SmolLM2's Dolly instructions.
    """
    x = torch.cat([known, unrelated]).double()
    y = torch.cat([torch.zeros(len(known)), torch.ones(len(unrelated))]).to(x)
    root = torch.where(y == 1, (len(known) / max(len(unrelated), 1)) ** 0.25, torch.ones_like(y))
    share = root.pow(2) / root.pow(2).sum()
    x, y = (x - share @ x) * root[:, None], (y - share @ y) * root
    gram = x @ x.T + penalty * x.shape[1] * torch.eye(len(x)).to(x)
    found: Tensor = (x.T @ torch.linalg.solve(gram, y)).float()
    return found


def _place(
    features: Float[Tensor, "n inputs"], task: list[int], unrelated: Float[Tensor, "m inputs"], rank: int, count: int
) -> tuple[Float[Tensor, "rank inputs"], Float[Tensor, "c rank"]]:
    """Directions in which other texts lie furthest from the tasks, in units of the spread within tasks."""
    of = torch.tensor(task, device=features.device)
    seen = sorted(set(task))  # an expert that no instruction is meant for gets the centre of one that some are
    means = torch.stack([features[of == (c if c in seen else seen[0])].mean(0) for c in range(count)])
    within = features - means[of]
    covariance = within.T @ within / max(len(within) - 1, 1)
    size = covariance.diagonal().mean()
    shrink = min(1.0, max(0.1, features.shape[1] / (features.shape[1] + len(features))))
    covariance = (1 - shrink) * covariance + shrink * size * torch.eye(len(covariance), device=features.device)
    values, vectors = torch.linalg.eigh(covariance.double())
    whiten = (vectors * values.clamp(min=1e-12).rsqrt()) @ vectors.T
    spots = torch.cat([means, unrelated]).double() @ whiten.T
    centre = spots[:count].mean(0)
    directions = torch.linalg.svd(spots - centre, full_matrices=False).Vh[:rank]
    basis = torch.zeros(rank, features.shape[1], dtype=torch.double, device=features.device)
    basis[: len(directions)] = directions @ whiten
    return basis.float(), (means.double() @ basis.T).float()
