"""How `generate` reads a prompt: once, where answers alone see experts, and without padding where that serves.

Knows the engine's adapters and the passage of a text. Where answers alone see experts, the first pass is the bare
base's own: the gates read what enters their layers as it goes by, and the tokens from the header of the answer on are
read again, with experts. Everywhere else the gate's pass of its own has been made before.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from smartmops.attention.packed import Segments
from smartmops.attention.passage import Passage, Reading
from smartmops.calls import mixed, prefill
from smartmops.experts import gate


def once(engine: Any, wrapper: Any, names: list[str] | None, kwargs: dict[str, Any], real: Tensor) -> bool:
    """Whether the first pass may be the bare base's own, with every gate reading what goes by."""
    adapters = {wrapper.current} if names is None else {*names} - {mixed.BASE}
    configs = [each.configs[name] for each in engine.wrappers.values() for name in adapters if name in each.configs]
    return prefill.plain(engine.model, engine.names, kwargs, real) and all(
        config.visible_to == "answers"
        and config.embedding_size is None
        and config.gate_layer != len(engine.layers)  # no layer is entered by what leaves the last one
        and not config.num_recovery_prompts
        for config in configs
    )


def arranged(engine: Any, kwargs: dict[str, Any], real: Bool[Tensor, "rows seq"], passage: Passage) -> dict[str, Any]:
    """What the model is called with in the first pass over a text."""
    carried = passage
    if engine.call.now.once:
        own = [part.passage for part in passage.parts] or [passage][: not passage.names]
        carried = Passage("", len(engine.layers), attended=True)
        carried.reading = Reading(passage, dict(kwargs), real, {_gate_layer(engine, each): None for each in own})
        kwargs["mops"] = carried
    elif (
        passage.start is not None
        or passage.gate is not None
        or not prefill.plain(engine.model, engine.names, kwargs, real)
    ):
        return kwargs
    return prefill.pack(kwargs, real, carried) if prefill.thin(real) else kwargs


def finished(engine: Any, passage: Passage, cache: Any, output: Any) -> Any:
    """What the model's caller gets: a row for each of the text's, their answers read with experts."""
    segments = passage.segments
    output = output if segments is None else prefill.unpack(output, passage)
    if passage.reading is None:
        return output
    _read(engine, passage.reading, segments)
    engine.last = cache.mops = passage.reading.text
    return prefill.again(engine.model, passage.reading, output)


def _read(engine: Any, reading: Reading, segments: Segments | None) -> None:
    """Read the gates of a text from what the bare base made of it."""
    text = reading.text
    for part in text.parts:
        hidden = reading.hidden(_gate_layer(engine, part.passage), segments)
        _enter(engine, part.passage, hidden[part.rows.to(hidden.device)])
        mixed.take(text, part)
    if not text.names:
        _enter(engine, text, reading.hidden(_gate_layer(engine, text), segments))


def _enter(engine: Any, passage: Passage, hidden: Float[Tensor, "rows seq hidden"]) -> None:
    assert passage.gate_mask is not None
    engine.wrappers[passage.first].enter(passage, gate.pool(hidden, passage.gate_mask.to(hidden.device)))


def _gate_layer(engine: Any, passage: Passage) -> int:
    layer: int | None = engine.wrappers[passage.first].configs[passage.adapter].gate_layer
    return passage.first if layer is None else layer
