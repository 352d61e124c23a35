"""What a trainer (transformers', TRL's) knows of a batch and does not tell the model. Knows frames; no gate.

A loss computed outside the model takes the labels off the batch, columns that `forward` does not name never reach it,
and packing leaves no trace. The trainer stands among the callers of a pass, and says.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import Tensor

from smartmops.checks.errors import AdapterError

_looked: weakref.WeakSet[Any] = weakref.WeakSet()  # trainers whose data were looked at


def _frames() -> Iterator[tuple[FrameType, Any]]:
    """The callers of this pass that are methods of a trainer, the nearest first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if hasattr(type(owner), "training_step"):
            yield frame, owner
        frame = frame.f_back


def packs(training: bool) -> bool:
    """Whether this pass is a step of a trainer whose arguments ask for packing.

    A row cut anywhere holds nothing by which to tell it from a chat.
    """
    for _, owner in _frames():
        arguments = getattr(owner, "args", None)
        asked = getattr(arguments, "packing", False)
        of_its_own = None if training else getattr(arguments, "eval_packing", None)
        return bool(asked if of_its_own is None else of_its_own)
    return False


def labels(like: Tensor) -> Tensor | None:
    """The labels of this batch, where a trainer took them off to compute the loss itself (label smoothing does)."""
    for frame, _ in _frames():
        if frame.f_code.co_name == "compute_loss":
            given = frame.f_locals.get("inputs")
            found = frame.f_locals.get("labels")
            if found is None and isinstance(given, dict):
                found = given.get("labels")
            if isinstance(found, Tensor) and found.shape == like.shape:
                return found
    return None


def refuse_dropped() -> None:
    """Refuse a `gate_mask` that stands in the trainer's data and did not arrive.

    Raises:
        AdapterError: so it is.
    """
    for _, owner in _frames():
        if owner not in _looked:
            data = (getattr(owner, name, None) for name in ("train_dataset", "eval_dataset"))
            if any("gate_mask" in _columns(each) for each in data):
                raise AdapterError("gate_mask is a column of the data, but the trainer does not hand it to the model: "
                                   "set remove_unused_columns=False, with a data_collator that keeps it")  # fmt: skip
            _looked.add(owner)
        return


def _columns(data: Any) -> list[str]:
    names = getattr(data, "column_names", None)
    if isinstance(names, list):
        return names
    first = data[0] if isinstance(data, list) and data else None
    return list(first) if isinstance(first, dict) else []
