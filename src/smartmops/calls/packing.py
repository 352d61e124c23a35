"""Whether several examples were laid into a row that was to hold one, which one gate cannot serve. Ids, masks, labels.

Positions that start anew say so. Where a packing hands on none ("wrapped"), its rows look like those of a chat of
several turns; then the trainer knows, and rows that begin in the middle of an answer tell.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from smartmops.attention.packed import IGNORED
from smartmops.checks.errors import AdapterError

from . import reading, trainers

WHY = "several examples are packed into it and one gate cannot serve them: turn packing"


def refuse_positions(position_ids: Tensor | None, attended: Tensor | None) -> None:
    """By positions: [rows, seq], where given; `attended`, [rows, seq], marks what is no padding.

    Raises:
        AdapterError: positions fall inside a row.
    """
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[-1] < 2:
        return
    falls = position_ids[:, 1:] < position_ids[:, :-1]
    if attended is not None:
        real = attended[:, -position_ids.shape[-1] :].bool()
        falls = falls & real[:, 1:] & real[:, :-1]
    if falls.any():
        raise AdapterError(f"position_ids restart inside a row, so {WHY} (padding_free) off")


def refuse(
    real: Bool[Tensor, "rows seq"], ids: Int[Tensor, "rows seq"] | None, labels: Int[Tensor, "rows seq"], training: bool
) -> None:
    """By labels, and by the trainer that made the batch.

    Raises:
        AdapterError: the trainer packs; or a row begins inside an answer and holds a later one too.
    """
    if trainers.packs(training):
        raise AdapterError(f"the trainer was told packing=True, so a row may be cut anywhere: {WHY} off")
    labelled = (labels != IGNORED) & real
    first = (labelled & (real.cumsum(-1) == 1)).any(-1)
    for row in ((answers(real, labels) > 1) & first).nonzero()[:, 0].tolist():
        masked = real[row] & ~labelled[row]
        if ids is None or len(torch.unique(ids[row][masked])) > 1:  # one id alone: a collator that masks every EOS
            raise AdapterError(f"row {row} begins inside an answer and holds a later one, so {WHY} off")


def answers(real: Bool[Tensor, "rows seq"], labels: Int[Tensor, "rows seq"]) -> Int[Tensor, " rows"]:
    """How many runs of labelled tokens each row holds."""
    spans = ((labels != IGNORED) & real).int()
    return (spans.diff(dim=-1, prepend=spans.new_zeros(len(spans), 1)) == 1).sum(-1)


def doubt(real: Bool[Tensor, "rows seq"], labels: Int[Tensor, "rows seq"] | None, training: bool) -> str | None:
    """What is to be said where labels leave the gate nothing of worth, may be of several examples, or are missing."""
    if labels is None:
        return ("no labels came with this text in training mode, so the gate reads all of it, its answer too: give "
                "labels, or a gate_mask") if training else None  # fmt: skip
    if bool((reading.before_answer(real, labels).sum(-1) < 2).any()):
        return ("labels cover the whole text of some rows, so the gate reads their first token alone: set the labels "
                "of the instruction to -100")  # fmt: skip
    if bool((answers(real, labels) > 1).any()):
        return ("labels of some rows hold several answers, and the gate reads what stands before the first: if these "
                "are no turns of one chat but examples packed into a row, turn packing off")  # fmt: skip
    return None
