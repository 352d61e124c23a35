"""One batch whose rows are served by several adapters, as PEFT's `adapter_names=` asks for.

Every row gets the columns of all adapters, those of others closed to it, so that one pass of text serves all. Knows
contexts and names; knows no tokens, no model.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from smartmops.attention.context import ForwardContext, Part
from smartmops.checks.errors import AdapterError, ArgumentTypeError
from smartmops.experts import gate

from . import reading
from .call import Told

BASE = "__base__"  # PEFT's name for a row that no adapter serves
# Whose call it is, and an adapter for each row; of the thread that calls.
_asked: contextvars.ContextVar[tuple[Any, list[str]] | None] = contextvars.ContextVar("mops_names", default=None)


def checked(names: Any, known: Sequence[str], training: bool) -> list[str]:
    """The names as a list.

    Raises:
        ArgumentTypeError: they are no list of names.
        AdapterError: one is of no adapter, or the model is being trained.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ArgumentTypeError(f"adapter_names={names!r}: give a list with one adapter's name for each row")
    if training:
        raise AdapterError("adapter_names serve inference, and this model is in training mode: call eval(), or train "
                           "one adapter at a time with set_adapter")  # fmt: skip
    if unknown := sorted({*names} - {*known, BASE}):
        raise AdapterError(f"adapter_names has {unknown}, but the adapters are {sorted(known)} (and {BASE!r} for none)")
    if not names:
        raise AdapterError("adapter_names is empty: give one adapter's name for each row")
    return list(names)


@contextmanager
def asked(engine: Any, names: list[str]) -> Iterator[None]:
    """Within it, `names` serve the rows of this engine's passes."""
    token = _asked.set((engine, names))
    try:
        yield
    finally:
        _asked.reset(token)


def names_of(engine: Any, rows: int | None = None) -> list[str] | None:
    """The adapter of each row, repeated for beams; None where nobody asked.

    Raises:
        AdapterError: the names do not fit the rows.
    """
    found = _asked.get()
    if found is None or found[0] is not engine:
        return None
    names = found[1]
    if rows is None:
        return names
    if rows % len(names):
        raise AdapterError(f"adapter_names has {len(names)} names for a batch of {rows} rows: give one for each row")
    return [name for name in names for _ in range(rows // len(names))]


def saves_modules(model: nn.Module) -> bool:
    """Whether adapters save modules whole: such a module must see as many rows as there are names."""
    return any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules())


@contextmanager
def saved_modules(engine: Any, model: nn.Module) -> Iterator[None]:
    """Let the modules that adapters save whole (`modules_to_save`) follow the names too.

    Raises:
        AdapterError: such a module has no copy of the active adapter, where PEFT would pass all rows by.
    """

    def name_rows(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (names := names_of(engine)) is None:  # another thread's pass
            return None
        alike = len(set(names)) == 1
        each = names[:1] * len(args[0]) if alike else names_of(engine, len(args[0]))
        return args, kwargs | {"adapter_names": each}

    handles = []
    try:
        for name, module in model.named_modules():
            if not isinstance(module, AuxiliaryTrainingWrapper):
                continue
            if not set(module.active_adapters) <= set(module._adapters):
                raise AdapterError(f"adapter_names: {name} is saved by {sorted(module._adapters)} alone, none of which "
                                   "is active: activate one of them with set_adapter")  # fmt: skip
            handles.append(module.register_forward_pre_hook(name_rows, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def begin(engine: Any, names: list[str], kwargs: Mapping[str, Any], real: Tensor, told: Told) -> ForwardContext:
    """What is known of such a batch before its first layer."""
    rows, groups = len(names), 0
    whole = ForwardContext(injection_layer=len(engine.layers), row_adapters=names)
    starts = torch.zeros(rows, dtype=torch.long, device=real.device)
    for adapter in dict.fromkeys(name for name in names if name != BASE):
        at = torch.tensor([row for row, name in enumerate(names) if name == adapter], device=real.device)
        own = functools.partial(_own, at=at, rows=rows)
        with asked(engine, [adapter]):
            part = engine.fresh(adapter, {n: own(value) for n, value in kwargs.items()}, real[at], told.each(own))
        whole.parts.append(Part(at, part))
        whole.injection_layer = min(whole.injection_layer, part.injection_layer)
        groups = max(groups, engine.wrapper_of(adapter).configs[adapter].num_groups)
        if part.visible_from is not None:
            starts[at] = part.visible_from
        if part.text is not None:
            before = torch.full_like(part.text[:1], reading.FREE).expand(rows, -1) if whole.text is None else whole.text
            whole.text = before.index_copy(0, at, part.text)
    if starts.any():
        whole.visible_from = starts
    whole.leave_to_base(torch.tensor([name == BASE for name in names], device=real.device))
    whole.attended = not whole.parts
    whole.gate = torch.zeros(rows, groups, device=real.device)
    for part in whole.parts:
        _take(whole, part)
    return whole


def read(whole: ForwardContext, wrapper: Any, hidden: Float[Tensor, "rows seq hidden"]) -> None:
    """Let the adapters of a wrapper's layer, those whose gate is unread, read theirs from their own rows."""
    for part in whole.parts:
        if part.context.injection_layer == wrapper.index and part.context.gate is None:
            read_part(whole, part, wrapper, hidden)


def read_part(whole: ForwardContext, part: Part, wrapper: Any, hidden: Float[Tensor, "rows seq hidden"]) -> None:
    """Let one adapter read its gate from its own rows, and put its experts in front of the whole batch."""
    wrapper.read(part.context, hidden[part.rows.to(hidden.device)])
    _take(whole, part)


def _own(value: Any, at: Int[Tensor, " own"], rows: int) -> Any:
    """The rows `at` of what has a row for each of the batch; anything else as it is."""
    each = isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows
    return value[at.to(value.device)] if each else value


def _spread(value: Tensor, at: Int[Tensor, " own"], rows: int, fill: float) -> Tensor:
    """Rows to their places among `rows`, with `fill` elsewhere."""
    own = value.expand(len(at), *value.shape[1:])
    return own.new_full((rows, *value.shape[1:]), fill).index_copy(0, at.to(value.device), own)


def _take(whole: ForwardContext, part: Part) -> None:
    """Move what an adapter has put in front of layers to the whole batch, closed to all rows but its own."""
    own, at = part.context, part.rows
    assert whole.gate is not None
    rows = len(whole.gate)
    if own.gate is not None:
        widened = torch.nn.functional.pad(own.gate, (0, whole.gate.shape[1] - own.gate.shape[1]))
        whole.gate = whole.gate.to(widened).index_copy(0, at.to(widened.device), widened)
        if own.null_weight is not None:
            before = own.null_weight.new_zeros(rows) if whole.null_weight is None else whole.null_weight
            whole.null_weight = before.index_copy(0, at.to(before.device), own.null_weight)
            whole.leave_to_base(_spread(own.null_weight >= 1, at, rows, False))
        whole.attended = whole.attended or own.attended
    for layer, seen in own.prefix.items():
        key, value = seen.key, seen.value
        if len(key) > 1:  # each row has its own
            key, value = (_spread(each, at, rows, 0.0) for each in (key, value))
        whole.put({layer: (key, value)}, _spread(seen.bias, at, rows, gate.CLOSED))
    for layer, columns in own.added.items():
        whole.added[layer] = whole.added.get(layer, []) + [
            replace(
                each, bias=_spread(each.bias, at, rows, gate.CLOSED), strength=_spread(each.strength, at, rows, 0.0)
            )
            for each in columns
        ]
    own.prefix, own.added = {}, {}
