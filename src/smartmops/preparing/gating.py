"""A gate in closed form: ridge scores, their temperature, the layer that tells tasks apart best, the null expert.

Knows pooled instructions and the expert each is meant for. Never sees a response.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from smartmops.checks.errors import ConfigError
from smartmops.experts import null
from smartmops.options.method import Texts, paragraphs

FOLDS = 5
PENALTIES = (0.003, 0.03, 0.3, 3.0)  # times the mean squared length of a standardised instruction
SHARPNESS = tuple(2.0**k for k in range(-2, 9))  # what scores are multiplied by: an inverse temperature
PROBED = 128  # instructions that a layer is judged by
FITTED = 512  # instructions that the gate is fitted on


@dataclass
class Scores:
    """Linear scores of standardised instructions, and how good they are on instructions they were not fitted on."""

    weight: Float[Tensor, "experts inputs"]
    constant: Float[Tensor, " experts"]
    nats: float  # mean negative log-likelihood of the right expert, held out
    accuracy: float  # share whose highest score is the right expert's, held out


def draw(of: Sequence[int], count: int, seed: int) -> list[int]:
    """At most `count` numbers of instructions, as many of each expert's as there are, up to the same number."""
    order = torch.randperm(len(of), generator=torch.Generator().manual_seed(seed)).tolist()
    by_expert: dict[int, list[int]] = {}
    for i in order:
        by_expert.setdefault(of[i], []).append(i)
    found: list[int] = []
    while len(found) < min(count, len(of)):
        for own in by_expert.values():
            if own and len(found) < count:
                found.append(own.pop())
    return sorted(found)


def _solve(
    x: Float[Tensor, "n inputs"], y: Float[Tensor, "n experts"], penalty: float
) -> Float[Tensor, "inputs experts"]:
    """Ridge regression, in whichever of the two forms is smaller."""
    n, d = x.shape
    strength = penalty * d
    if n <= d:
        found: Tensor = x.T @ torch.linalg.solve(x @ x.T + strength * torch.eye(n, device=x.device), y)
        return found
    found = torch.linalg.solve(x.T @ x + strength * torch.eye(d, device=x.device), x.T @ y)
    return found


def ridge(x: Float[Tensor, "n inputs"], expert_of: Int[Tensor, " n"], experts: int) -> Scores:
    """Ridge regression onto the right expert; penalty and sharpness are the best on held-out fifths.

    Softmax of sharpness * (W a + c) is the gate. The likelihood is of targets that leave 1 / (n + experts) for
    surprises, so that a gate that was never wrong is not certain either (Laplace's rule of succession).
    """
    n = len(x)
    targets = F.one_hot(expert_of, experts).float().to(x.device)
    share = (targets.sum(0) + 1) / (n + experts)
    fold = torch.randperm(n, generator=torch.Generator().manual_seed(0)) % min(FOLDS, max(n, 2))
    kept = 1 - experts / (n + experts)
    soft = targets * kept + (1 - kept) / experts
    best: tuple[float, float, float, float] | None = None
    for penalty in PENALTIES:
        held = torch.empty_like(targets)
        for part in range(int(fold.max()) + 1):
            out = (fold == part).to(x.device)
            if bool(out.all()):
                continue
            mean = targets[~out].mean(0)
            held[out] = x[out] @ _solve(x[~out], targets[~out] - mean, penalty) + mean
        accuracy = float((held.argmax(-1) == expert_of.to(x.device)).float().mean())
        for sharp in SHARPNESS:
            nats = float(-(soft * F.log_softmax(sharp * held, -1)).sum(-1).mean())
            if best is None or nats < best[0]:
                best = (nats, accuracy, penalty, sharp)
    assert best is not None
    nats, accuracy, penalty, sharp = best
    weight = _solve(x, targets - share, penalty)
    return Scores(sharp * weight.T, sharp * share, nats, accuracy)


@torch.no_grad()
def start_gate(model: Any, scores: Scores) -> None:
    """Make the gate these scores: relu(s) - relu(-s) = s, so two hidden units for each expert carry them exactly.

    Raises:
        ConfigError: the gate has too few hidden units, no constant, or another granularity.
    """
    layer = model.base_model.layer()
    config = layer.configs["default"]
    experts, width = len(scores.weight), config.gate_hidden_size
    if width < 2 * experts or not config.gate_bias or config.num_groups != experts:
        raise ConfigError(f"gate_hidden_size={width} cannot carry the scores of {experts} experts: choose "
                          f"{2 * experts} or more, gate_bias=True and gate_granularity='expert'")  # fmt: skip
    gate_in, gate_out = layer.mops_gate_in["default"], layer.mops_gate_out["default"]
    gate_in[:experts], gate_in[experts : 2 * experts] = scores.weight.to(gate_in), -scores.weight.to(gate_in)
    gate_in[2 * experts :] *= 0.1 * scores.weight.std().to(gate_in) / gate_in.std().clamp(min=1e-6)
    gate_out.zero_()
    eye = torch.eye(experts).to(gate_out)
    gate_out[:, :experts], gate_out[:, experts : 2 * experts] = eye, -eye
    layer.mops_gate_bias["default"].copy_(scores.constant)


def best_layer(means: Float[Tensor, "layers n hidden"], expert_of: Sequence[int], experts: int, last: int) -> int:
    """The lowest layer (up to `last`) whose ridge scores tell experts apart as well as any layer's, on held-out fifths.

    "As well" is within 5 % of the best likelihood: a lower layer is read sooner. The lowest quarter is left out: there
    is little there but the words themselves, which tell known tasks apart and say nothing of others.
    """
    of, found = torch.tensor(list(expert_of)), dict[int, float]()
    for layer in range(-(-last // 4), last + 1):
        x = means[layer]
        x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
        found[layer] = ridge(x, of, experts).nats
    return next(layer for layer, nats in found.items() if nats <= 1.05 * min(found.values()))


def unrelated_texts(file: Path | None = None) -> list[str]:
    """Texts of no task, a paragraph each: of a file, or those that come with the package.

    Raises:
        ConfigError: the file cannot be read, or holds fewer than 20 texts.
    """
    if file is not None and (said := Texts().wrong(file)) is not None:
        raise ConfigError(f"--unrelated {file}{said}")
    return paragraphs((file or files("smartmops.preparing") / "unrelated.txt").read_text(encoding="utf-8"))


@torch.no_grad()
def fit_null(
    model: Any, features: Float[Tensor, "n inputs"], expert_of: Sequence[int], unrelated: Float[Tensor, "m inputs"]
) -> null.Fitted:
    """Fit and store the null expert; both kinds of features as the gate reads them, before standardisation."""
    layer = model.base_model.layer()
    config = layer.configs["default"]
    rank = len(layer.mops_null_basis["default"])
    found = null.fit(layer.standardised(features, "default"), list(expert_of),
                     layer.standardised(unrelated, "default"), rank, config.num_experts)  # fmt: skip
    for name in ("basis", "centres", "direction", "cut"):
        getattr(layer, f"mops_null_{name}")["default"].copy_(getattr(found, name))
    return found


@contextmanager
def closed(model: Any) -> Iterator[None]:
    """For a while, everything is left to the base."""
    config = model.base_model.layer().configs["default"]
    before, config.null_threshold = config.null_threshold, 0.0
    try:
        yield
    finally:
        config.null_threshold = before


def leaves(model: Any) -> bool:
    """Whether a part of the weight of some text may go to no expert, so that weights of experts sum to less than 1."""
    config = model.base_model.layer().configs["default"]
    return bool(config.null_expert or config.null_threshold <= 0)


def close(model: Any) -> None:
    """Leave everything to the base: from now on the adapter answers as the frozen model does, bit for bit."""
    model.base_model.layer().configs["default"].null_threshold = 0.0
