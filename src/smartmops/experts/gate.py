"""Pooled hidden state in, expert weights out. No prompts, no attention, no tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from smartmops.attention.packed import Segments
from smartmops.checks.errors import AdapterError

CLOSED = -1e30  # on a column: nobody attends to it, and no sum of such biases is infinite


def pool(
    hidden: Float[Tensor, "batch seq hidden"], mask: Bool[Tensor, "*batch seq"], segments: Segments | None = None
) -> Float[Tensor, "rows hidden"]:
    """avg_emb of Algorithm 1: the mean of the hidden states the gate may read, in float32; of each row, or segment."""
    if segments is not None:
        return segments.mean(hidden[0], mask)
    weight = mask.to(torch.float32).unsqueeze(-1)
    return (hidden.to(torch.float32) * weight).sum(1) / weight.sum(1).clamp(min=1)


def log_gate(
    pooled: Float[Tensor, "batch inputs"],
    mean: Float[Tensor, inputs],
    scale: Float[Tensor, inputs],
    w_in: Float[Tensor, "d_g inputs"],
    w_out: Float[Tensor, "groups d_g"],
    temperature: float = 1.0,
    top_k: int | None = None,
    renormalise: bool = True,
    constant: Float[Tensor, groups] | None = None,
) -> Float[Tensor, "batch groups"]:
    """log g, with g = softmax((W_ff2 relu(W_ff1 a) + b) / T) and a the standardised mean embedding (natural log).

    The paper's gate has no `constant` b.

    With `top_k`, all but the k highest weights are zero (log: the lowest float). The rest sum to one, or, without
    `renormalise`, keep the weights they had: a gate that keeps one expert then still has a gradient, as in SMoP (Choi
    et al. 2023).
    """
    scores = ((pooled - mean) / scale) @ w_in.T
    scores = torch.relu(scores) @ w_out.T
    scores = (scores if constant is None else scores + constant) / temperature
    if top_k is not None and top_k < scores.shape[-1]:
        highest = scores.topk(top_k, -1).indices
        keep = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, highest, True)
        lowest = torch.finfo(scores.dtype).min
        if not renormalise:
            return torch.log_softmax(scores, -1).masked_fill(~keep, lowest)
        scores = scores.masked_fill(~keep, lowest)
    return torch.log_softmax(scores, -1)


def checked(weights: Float[Tensor, "rows any"], experts: int) -> Float[Tensor, "rows any"]:
    """Weights that a caller tells: of each expert, or NaN in a whole row that the gate is to decide.

    Raises:
        AdapterError: they are of another shape, negative, or do not sum to one.
    """
    if weights.dim() != 2 or weights.shape[1] != experts:
        raise AdapterError(f"gate_weights is of shape {list(weights.shape)}: give a row for each text, with {experts} "
                           "weights")  # fmt: skip
    given = weights[~weights.isnan().all(-1)].float()
    if not bool((given >= 0).all()) or not torch.allclose(given.sum(-1), torch.ones(len(given)).to(given), atol=1e-4):
        raise AdapterError("gate_weights are no shares: give weights of 0 or more that sum to one in each row, or NaN "
                           "in a whole row that the gate is to decide")  # fmt: skip
    return weights


def told(
    log_g: Float[Tensor, "batch groups"], lost: Float[Tensor, " batch"] | None, weights: Float[Tensor, "batch experts"]
) -> tuple[Float[Tensor, "batch groups"], Float[Tensor, " batch"] | None]:
    """Log gate and null weight, in rows that are told their weights replaced by those; nothing is left to the base."""
    each, weights = log_g.shape[1] // weights.shape[1], weights.to(log_g)
    decided = weights.isnan().any(-1)
    logs = (weights / each).log().clamp(min=torch.finfo(log_g.dtype).min).repeat_interleave(each, -1)
    log_g = torch.where(decided[:, None], log_g, logs)
    return log_g, None if lost is None else torch.where(decided, lost, torch.zeros_like(lost))


def by_expert(gate: Float[Tensor, "batch groups"], experts: int) -> Float[Tensor, "batch experts"]:
    """Weight of each expert: the gate's own, or the sum over an expert's prompts where each prompt has a weight."""
    return gate.unflatten(-1, (experts, -1)).sum(-1)  # type: ignore[no-untyped-call, no-any-return]


def bias(
    log_g: Float[Tensor, "batch groups"], prompts: int, scale: Sequence[float] | None = None
) -> Float[Tensor, "batch prompts"]:
    """log(G * g) on every prompt column: its attention weight times g, renormalised; uniform gates give zero.

    G is the number of groups, or the `scale` of each: experts keep theirs when others come or go.
    """
    groups = log_g.shape[-1]
    lift = math.log(groups) if scale is None else log_g.new_tensor([math.log(each) for each in scale])
    lifted = (log_g + lift).clamp(min=torch.finfo(log_g.dtype).min)
    return lifted.repeat_interleave(prompts // groups, -1)


def dimmed(bias: Float[Tensor, "batch columns"], lost: Float[Tensor, " batch"]) -> Float[Tensor, "batch columns"]:
    """The bias on columns once a share `lost` of the gate's weight has gone to no column; CLOSED where all has."""
    shut = (lost >= 1)[:, None]
    left = torch.log1p(-lost.masked_fill(lost >= 1, 0))[:, None]
    return (bias + left).masked_fill(shut, 2 * CLOSED)
