"""What the bare base makes of each example's instruction: what the gate reads, or what enters every layer.

The responses are cut off first, and what many instructions begin with goes through the base once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smartmops.attention.packed import IGNORED, Packed, Segments
from smartmops.progress.bars import track
from smartmops.tokens.batches import Encoded, by_budget, pack
from smartmops.tuner.engine import Engine
from smartmops.tuner.states import Opening, entering_each, opening

from .openings import openings


def instructions(model: Any, rows: Sequence[Encoded], budget: int = 4096) -> Float[Tensor, "n d_in"]:
    """What the gate reads of each example, before standardisation; the responses are cut off first.

    `budget` tokens go through the lower half at once.
    """
    embedded = [row.gate_embedding for row in rows if row.gate_embedding is not None]
    if embedded:
        return torch.stack(embedded)
    inner = model.base_model
    return _of_each(rows, budget, "instructions", model.device, partial(inner.opening, whole=False), inner.gate_inputs)


@torch.no_grad()
def layer_means(base: Any, rows: Sequence[Encoded], budget: int = 1024) -> Float[Tensor, "layers n hidden"]:
    """Mean hidden state entering each layer of the bare base, over what the gate may read of each instruction."""
    own = not hasattr(base, "mops_engine")
    engine = Engine.on(base)
    every = range(len(engine.layers))

    def means(batch: dict[str, Tensor], begun: Sequence[Opening | None]) -> Float[Tensor, "segments read"]:
        given = Packed.of(batch)
        read = torch.ones_like(given.labels, dtype=torch.bool) if given.gate_mask is None else given.gate_mask
        return Segments(given.lengths.tolist(), given.labels.device).mean(
            entering_each(engine, given, every, begun), read
        )

    try:
        begin = partial(opening, engine, at=every, layers=max(len(every) - 1, 1))
        found = _of_each(rows, budget, "looking for the gate's layer", base.device, begin, means)
    finally:
        if own:
            engine.remove()
    return found.view(len(found), len(every), -1).transpose(0, 1).cpu()


def _of_each(
    rows: Sequence[Encoded], budget: int, what: str, device: torch.device,
    begin: Callable[[Int[Tensor, " tokens"]], Opening],
    read: Callable[[dict[str, Tensor], Sequence[Opening | None]], Float[Tensor, "segments read"]],
) -> Float[Tensor, "n read"]:  # fmt: skip
    """What is read of each instruction, in the order of the rows."""
    asked = [_instruction(row) for row in rows]
    shared = openings([row.input_ids[:-1] for row in asked])  # of each, a token at least is left
    begun = [begin(torch.tensor(each, device=device)) for each in shared.tokens]
    groups = by_budget([len(row.input_ids) for row in asked], budget)
    found = []
    for group in track(groups, what):
        batch = {name: value.to(device) for name, value in pack([asked[i] for i in group]).items()}
        numbers = [shared.of[i] for i in group]
        found.append(read(batch, [None if number is None else begun[number] for number in numbers]))
    order = torch.tensor([i for group in groups for i in group])
    return torch.cat(found)[order.argsort().to(found[0].device)]


def _instruction(row: Encoded) -> Encoded:
    count = row.labels.count(IGNORED)
    mask = None if row.gate_mask is None else row.gate_mask[:count]
    return replace(row, input_ids=row.input_ids[:count], labels=row.labels[:count], gate_mask=mask)
