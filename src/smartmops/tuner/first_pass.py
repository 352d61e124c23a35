"""How `generate` reads a prompt: once, where answers alone see experts, and without padding where that serves.

Knows the engine's adapters and the context of a text. Where answers alone see experts, the first pass is the bare
base's own: the gates read what enters their layers as it goes by, and the tokens from the header of the answer on are
read again, with experts. Everywhere else a gate that reads another layer has done so in a pass of its own before.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool
from torch import Tensor

from smartmops.attention.context import ForwardContext, Reading
from smartmops.attention.packed import Segments
from smartmops.calls import mixed, prefill


def once(engine: Any, names: list[str], kwargs: dict[str, Any], real: Bool[Tensor, "rows seq"]) -> bool:
    """Whether the first pass may be the bare base's own, with every gate reading what goes by."""
    configs = [engine.wrapper_of(name).configs[name] for name in {*names} - {mixed.BASE}]
    return prefill.plain(engine.model, engine.names, kwargs, real) and all(
        config.visible_to == "answers"
        and config.embedding_size is None
        and config.gate_layer != len(engine.layers)  # no layer is entered by what leaves the last one
        and not config.num_recovery_prompts
        for config in configs
    )


def arranged(
    engine: Any, kwargs: dict[str, Any], real: Bool[Tensor, "rows seq"], context: ForwardContext
) -> dict[str, Any]:
    """What the model is called with in the first pass over a text."""
    if engine.call.now.once:
        own = [part.context for part in context.parts] or [context][: not context.row_adapters]
        carried = ForwardContext(injection_layer=len(engine.layers), attended=True)
        carried.reading = Reading(context, dict(kwargs), real, {_gate_layer(engine, each): None for each in own})
        kwargs["mops"] = carried
        return prefill.pack(kwargs, real, carried) if prefill.thin(real) else kwargs
    if context.row_adapters or context.visible_from is not None or _config(engine, context).reads_ahead:
        return kwargs
    packs = prefill.thin(real) and prefill.plain(engine.model, engine.names, kwargs, real)
    return prefill.pack(kwargs, real, context) if packs else kwargs


def finished(engine: Any, context: ForwardContext, cache: Any, output: Any) -> Any:
    """What the model's caller gets: a row for each of the text's, their answers read with experts."""
    segments = context.segments
    output = output if segments is None else prefill.unpack(output, context)
    if context.reading is None:
        return output
    _read(engine, context.reading, segments)
    engine.last = cache.mops = context.reading.text
    return prefill.again(engine.model, context.reading, output)


def _read(engine: Any, reading: Reading, segments: Segments | None) -> None:
    """Read the gates of a text from what the bare base made of it."""
    text = reading.text
    for part in text.parts:
        hidden = reading.hidden(_gate_layer(engine, part.context), segments)
        mixed.read_part(text, part, engine.wrapper_of(part.context.adapter), hidden)
    if not text.row_adapters:
        engine.wrapper_of(text.adapter).read(text, reading.hidden(_gate_layer(engine, text), segments))


def _config(engine: Any, context: ForwardContext) -> Any:
    return engine.wrapper_of(context.adapter).configs[context.adapter]


def _gate_layer(engine: Any, context: ForwardContext) -> int:
    layer: int | None = _config(engine, context).gate_layer
    return context.injection_layer if layer is None else layer
