"""How unlike all training instructions a text is, and the weight that therefore goes to no expert.

Features in, weight out. No tasks, no files. A gate is sure of itself on what it never saw too; a distance is not.
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
    cut: Float[Tensor, " two"],
    threshold: float,
) -> Float[Tensor, " n"]:
    """Null weight, sigmoid(cut[1] * (novelty - cut[0])); 1 from `threshold` on. `cut[0]` = inf: 0 everywhere."""
    found = torch.sigmoid(cut[1] * (novelty(features, basis, centres) - cut[0]))
    return torch.where(found >= threshold, torch.ones_like(found), found)


@dataclass
class Fitted:
    """What `weight` needs, and how well it tells training instructions from other text."""

    basis: Float[Tensor, "rank inputs"]
    centres: Float[Tensor, "c rank"]
    cut: Float[Tensor, " two"]
    kept: float  # share of held-out training instructions that stay below the cut
    caught: float  # share of the unrelated texts beyond it


def fit(
    features: Float[Tensor, "n inputs"],
    task: list[int],
    unrelated: Float[Tensor, "m inputs"],
    rank: int,
    centres: int,
    lose: float = 0.02,
) -> Fitted:
    """Fit distance and cut: at most a share `lose` of held-out training instructions may fall beyond the cut.

    Half of the instructions place centres and spread, the other half show how far new instructions of the same tasks
    lie; the cut is put between those and the unrelated texts. Then all instructions place centres and spread.

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
    known, other = novelty(features[there], basis, placed), novelty(unrelated[1::2], basis, placed)
    low, high = float(known.quantile(1 - lose)), float(other.quantile(lose))
    middle = (low + high) / 2 if high > low else low
    gap = max(high - low, float(known.std()) if len(known) > 1 else 0.1, 0.1)
    basis, placed = _place(features, task, unrelated, rank, centres)
    cut = torch.tensor([middle, 8 / gap])
    return Fitted(basis, placed, cut, float((known < middle).float().mean()), float((other >= middle).float().mean()))


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
