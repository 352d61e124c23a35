"""What the gate reads of each example's instruction, through the lower half alone. The responses are cut off first.

What many instructions begin with goes through it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from smartmops.attention.packed import IGNORED
from smartmops.progress.bars import track
from smartmops.tokens.batches import Encoded, by_budget, pack

from .openings import openings


def instructions(model: Any, rows: Sequence[Encoded], budget: int = 4096) -> Float[Tensor, "n d_in"]:
    """What the gate reads of each example, before standardisation; the responses are cut off first.

    `budget` tokens go through the lower half at once.
    """
    embedded = [row.gate_embedding for row in rows if row.gate_embedding is not None]
    if embedded:
        return torch.stack(embedded)
    asked = [_instruction(row) for row in rows]
    shared = openings([row.input_ids[:-1] for row in asked])  # of each, a token at least is left
    begun = [model.base_model.opening(torch.tensor(each, device=model.device), whole=False) for each in shared.tokens]
    groups = by_budget([len(row.input_ids) for row in asked], budget)
    found = []
    for group in track(groups, "instructions"):
        batch = {name: value.to(model.device) for name, value in pack([asked[i] for i in group]).items()}
        numbers = [shared.of[i] for i in group]
        found.append(model.base_model.gate_inputs(batch, [None if n is None else begun[n] for n in numbers]))
    order = torch.tensor([i for group in groups for i in group])
    return torch.cat(found)[order.argsort().to(found[0].device)]


def _instruction(row: Encoded) -> Encoded:
    count = row.labels.count(IGNORED)
    mask = None if row.gate_mask is None else row.gate_mask[:count]
    return replace(row, input_ids=row.input_ids[:count], labels=row.labels[:count], gate_mask=mask)
