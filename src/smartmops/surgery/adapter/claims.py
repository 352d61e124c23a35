"""Which instructions are an added expert's: a rule fitted on its own ones against all others, and its limit.

Features in, rule out (see `experts/routes.py`). No model, no text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from smartmops.adapter.fresh import CLAIM_RANK
from smartmops.checks.errors import DataError
from smartmops.experts import null, routes

from .parts import Claim

FEWEST = 8  # instructions of its own that a rule can be fitted by
SPARED = 0.005  # share of the other experts' instructions that a rule may take, at most
MISSED = 0.02  # share of its own instructions that it may miss where the two kinds lie apart


@dataclass(frozen=True)
class Fitted:
    """A rule, and what it does on instructions that it was not fitted on."""

    claim: Claim
    sent: float  # share of the expert's own instructions
    taken: float  # share of the other experts'

    def shares(self) -> dict[str, float]:
        """What it does, without the rule."""
        return {"sent": self.sent, "taken": self.taken}


def never(inputs: int) -> Claim:
    """The rule of an expert that answers by name only."""
    cut = torch.tensor([torch.inf, 1.0, torch.inf, -torch.inf])
    rank = min(CLAIM_RANK, inputs)
    return Claim(torch.zeros(rank, inputs), torch.zeros(rank), torch.zeros(inputs), cut)


def fit(
    own: Float[Tensor, "n inputs"], others: Float[Tensor, "m inputs"], unrelated: Float[Tensor, "u inputs"]
) -> Fitted:
    """Fit a rule, all features standardised as the gate has them.

    Each half of the instructions is measured by a rule fitted on the other half. The limit lies midway between the two
    kinds where they lie apart; where they do not, so low that it takes a share `SPARED` of the others' at most.

    Raises:
        ValueError: there are too few instructions.
    """
    if len(own) < FEWEST:
        raise DataError(f"{len(own)} instructions of the new expert: give {FEWEST} or more, or --by-name")
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randperm(len(each), generator=generator) % 2 == 0 for each in (own, others, unrelated)]
    measured: list[list[Tensor]] = [[], [], []]
    for flip in (False, True):
        here = [(side ^ flip).to(own.device) for side in sides]
        rule = _rule(own[here[0]], others[here[1]], unrelated[here[2]])
        for each, features, mask in zip(measured, (own, others, unrelated), here, strict=True):
            each.append(_unlike(rule, features[~mask]))
    mine, theirs, nobodys = (torch.cat(each) for each in measured)
    limit = _limit(mine, torch.cat([theirs, nobodys]), theirs)
    found = _rule(own, others, unrelated)
    cut = torch.cat([found.cut[:3], torch.tensor([limit]).to(found.cut)])
    return Fitted(Claim(found.basis, found.centre, found.direction, cut), _share(mine < limit), _share(theirs < limit))


def _share(holds: Bool[Tensor, " n"]) -> float:
    return float(holds.float().mean()) if len(holds) else 0.0


def _limit(mine: Float[Tensor, " n"], all_others: Float[Tensor, " m"], theirs: Float[Tensor, " k"]) -> float:
    last, first = float(mine.quantile(1 - MISSED)), float(all_others.quantile(SPARED))
    if last < first:
        return (last + first) / 2
    # Between two instructions, so that no rounding decides.
    return float(theirs.quantile(SPARED)) - 1e-4


def _rule(
    own: Float[Tensor, "n inputs"], others: Float[Tensor, "m inputs"], unrelated: Float[Tensor, "u inputs"]
) -> Claim:
    """The null expert's measure, with the added expert as the only task."""
    rank = min(CLAIM_RANK, own.shape[1])
    found = null.fit(own, [0] * len(own), torch.cat([others, unrelated]), rank, 1)
    return Claim(found.basis, found.centres[0], found.direction, torch.cat([found.cut, torch.zeros(1)]).to(own.device))


def _unlike(rule: Claim, features: Float[Tensor, "n inputs"]) -> Float[Tensor, " n"]:
    return routes.unlikeness(features, rule.basis, rule.centre, rule.direction, rule.cut)


def threshold(kept: Float[Tensor, " n"], left: Float[Tensor, " m"], lose: float) -> float:
    """Null weight from which on text is left to the base: midway, in logits, between instructions and other text.

    Args:
        kept: Null weights of the run's own instructions.
        left: Of text that it should leave alone.
        lose: Share of the former that may be beyond it, at most.
    """
    own, other = (each.double().clamp(1e-9, 1 - 1e-9).logit() for each in (kept, left))
    high, low = float(own.quantile(1 - lose, interpolation="higher")), float(other.quantile(0.05))
    at = (high + low) / 2 if low > high else high + 1e-3
    return float(torch.tensor(at).double().sigmoid())
