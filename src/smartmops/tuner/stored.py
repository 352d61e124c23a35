"""Whether stored tensors are those of an adapter: PEFT takes what fits and goes on without the rest."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

WAY_OUT = "load the folder that save_pretrained or `smartmops train` wrote, as it was written"


def check(own: Mapping[str, Tensor], stored: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> None:
    """Whether `stored` holds what the adapter has (`own`), and nothing that the model does not (`known`).

    Raises:
        ValueError: it does not; the message names the first tensor.
    """
    for name, value in own.items():
        if name not in stored:
            raise ValueError(f"the adapter's file lacks {_short(name)}: {WAY_OUT}")
        given = stored[name]
        if given.shape != value.shape:
            raise ValueError(f"{_short(name)} of the adapter's file is of shape {[*given.shape]}, but its config asks "
                             f"for {[*value.shape]}: {WAY_OUT}")  # fmt: skip
        if not given.is_floating_point():
            raise ValueError(
                f"{_short(name)} of the adapter's file is of type {given.dtype}, no real numbers: {WAY_OUT}"
            )
        if not given.is_meta and bool(torch.isnan(given).any()):
            raise ValueError(f"{_short(name)} of the adapter's file holds what is no number (nan): {WAY_OUT}")
    if unknown := sorted({*stored} - {*known}):
        raise ValueError(f"the adapter's file holds {unknown[0]!r:.200}, which this model has no place for: {WAY_OUT}")


def _short(name: str) -> str:
    return name.rpartition(".")[0].rpartition(".")[2]
