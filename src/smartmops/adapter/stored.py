"""Whether stored tensors are those of an adapter: PEFT takes what fits and goes on without the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smartmops.checks.errors import AdapterError

WAY_OUT = "load the folder that save_pretrained or `smartmops train` wrote, as it was written"


def check(own: Mapping[str, Tensor], stored: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> None:
    """Whether `stored` holds what the adapter has (`own`), and nothing that the model does not (`known`).

    Raises:
        AdapterError: it does not; the message names the first tensor.
    """
    for name, value in own.items():
        if name not in stored:
            raise AdapterError(f"the adapter's file lacks {_short(name)}: {WAY_OUT}")
        given = stored[name]
        if given.shape != value.shape:
            raise AdapterError(f"{_short(name)} of the adapter's file is of shape {[*given.shape]}, but its config "
                               f"asks for {[*value.shape]}: {WAY_OUT}")  # fmt: skip
        if not given.is_floating_point():
            raise AdapterError(
                f"{_short(name)} of the adapter's file is of type {given.dtype}, no real numbers: {WAY_OUT}"
            )
        if not given.is_meta and bool(torch.isnan(given).any()):
            raise AdapterError(f"{_short(name)} of the adapter's file holds what is no number (nan): {WAY_OUT}")
    if unknown := sorted({*stored} - {*known}):
        raise AdapterError(
            f"the adapter's file holds {unknown[0]!r:.200}, which this model has no place for: {WAY_OUT}"
        )


def check_sizes(file: Path, shapes: Mapping[str, Sequence[int | None]]) -> None:
    """Whether the tensors in a file, by its header alone, are of the sizes that a config asks for.

    Raises:
        AdapterError: one is not, or the file is damaged.
    """
    if not file.is_file():
        return
    try:
        with safe_open(file, framework="numpy") as opened:
            found = {name: list(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AdapterError(
            f"{file} is damaged or cut short ({_line(error)}): copy it again from where it was saved"
        ) from None
    for name, asked in shapes.items():
        given = next((shape for each, shape in found.items() if each.rpartition(".")[2] == name), None)
        if given is None:
            raise AdapterError(f"the adapter's file lacks {name}: {WAY_OUT}")
        if len(asked) != len(given) or any(a not in (None, b) for a, b in zip(asked, given, strict=True)):
            raise AdapterError(f"{name} of the adapter's file is of shape {given}, but its config asks for "
                               f"{['?' if each is None else each for each in asked]}: {WAY_OUT}")  # fmt: skip


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _short(name: str) -> str:
    return name.rpartition(".")[0].rpartition(".")[2]
