"""How `generate` reads a prompt: once, where answers alone see experts, and without padding where that serves.

Knows the engine's adapters and the context of a text. Where answers alone see experts, the first pass is the bare
base's own: the gates read what enters their layers as it goes by, and the tokens from the header of the answer on are
read again, with experts. Of one row these go again through the layers between experts and gate alone, and then on in
the same pass. Everywhere else a gate that reads another layer has done so in a pass of its own before.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from smartmops.attention.context import Call, ForwardContext, Reading
from smartmops.attention.packed import Segments
from smartmops.calls import mixed, prefill

BY_TOKEN = {"position_ids": 1, "position_embeddings": 1, "cache_position": 0}  # dimension that goes over tokens
ALIKE = {"past_key_values", "use_cache"}  # the same for some of the tokens as for all


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
        kwargs = prefill.last_alone(engine.model, kwargs)
        carried.reading = Reading(context, dict(kwargs), real, {_gate_layer(engine, each): None for each in own})
        if len(real) == 1 and not context.row_adapters and bool(real.all()):
            _turns(engine, carried)
        if context.row_adapters and mixed.saves_modules(engine.model):
            return kwargs | {"mops": carried}
        kwargs, carried.reading.distinct = prefill.distinct(kwargs, real)
        real, _ = carried.reading.distinct or (real, None)
        kwargs["mops"] = carried
        return prefill.pack(kwargs, real, carried) if prefill.thin(real) else kwargs
    whole = context.row_adapters or context.visible_from is not None or _config(engine, context).reads_ahead
    packs = not whole and prefill.thin(real) and prefill.plain(engine.model, engine.names, kwargs, real)
    return prefill.pack(kwargs, real, context) if packs else prefill.last_alone(engine.model, kwargs)


def finished(engine: Any, context: ForwardContext, cache: Any, output: Any) -> Any:
    """What the model's caller gets: a row for each of the text's, their answers read with experts."""
    segments = context.segments
    output = output if segments is None else prefill.unpack(output, context)
    if context.reading is None:
        return output
    if context.reading.distinct is not None:
        _, each = context.reading.distinct
        cache.batch_select_indices(each)
        output.logits = output.logits[each.to(output.logits.device)]
    if not context.reading.turned:
        _read(engine, context.reading, segments)
    engine.last = cache.mops = context.reading.text
    return output if context.reading.turned else prefill.again(engine.model, context.reading, output)


def _read(engine: Any, reading: Reading, segments: Segments | None) -> None:
    """Read the gates of a text from what the bare base made of it."""
    text = reading.text
    for part in text.parts:
        hidden = reading.hidden(_gate_layer(engine, part.context), segments)
        mixed.read_part(text, part, engine.wrapper_of(part.context.adapter), hidden)
    if not text.row_adapters:
        engine.wrapper_of(text.adapter).read(text, reading.hidden(_gate_layer(engine, text), segments))


def _turns(engine: Any, carried: ForwardContext) -> None:
    """Let experts come into this pass as soon as the gate has been read."""
    reading = carried.reading
    assert reading is not None
    first, layer = reading.text.injection_layer, _gate_layer(engine, reading.text)
    reading.calls = dict.fromkeys(range(first, layer))
    reading.turn = max(first, layer), functools.partial(_turned, engine, carried)


def _turned(engine: Any, carried: ForwardContext, call: Call) -> Call | None:
    """Read the gate, and the header with experts up to this layer; from here on the pass is the text's own.

    The header's tokens enter again where experts begin, so their keys and values there are written anew; what stands
    before them sees no experts and is as it was. None: these layers take what cannot be cut, and nothing is done.
    """
    reading = carried.reading
    assert reading is not None
    text, calls = reading.text, {layer: each for layer, each in reading.calls.items() if each is not None}
    if not all(_can_be_cut(each) for each in calls.values()) or not call[0]:
        return None
    _read(engine, reading, None)
    if text.null_weight is not None and bool((text.null_weight >= 1).all()):
        return call
    assert text.visible_from is not None
    first, ((hidden, *others), kwargs) = int(text.visible_from), call
    if calls:
        own = copy.copy(text)
        own.visible = None  # all of these tokens see experts
        header = calls[text.injection_layer][0][0][:, first:]
        for layer in sorted(calls):
            header = _once_more(engine.layers[layer], layer, header, calls[layer][1], own)
        hidden = torch.cat([hidden[:, :first], header], 1)
    carried.prefix, carried.added, carried.visible = text.prefix, text.added, text.visible
    return (hidden, *others), kwargs


def _can_be_cut(call: Call) -> bool:
    """Whether a layer that was called so can be called with some of the tokens alone."""
    args, kwargs = call
    given = {name for name, value in kwargs.items() if value is not None and value is not False}
    if len(args) != 1 or not {"past_key_values"} <= given <= {"attention_mask", *BY_TOKEN, *ALIKE}:
        return False
    parts = [(each, at) for name, at in BY_TOKEN.items() if name in given
             for each in (kwargs[name] if isinstance(kwargs[name], tuple) else (kwargs[name],))]  # fmt: skip
    return all(each.dim() > at and each.shape[at] == args[0].shape[1] for each, at in parts)


def _once_more(
    layer: Any, number: int, hidden: Float[Tensor, "1 own hidden"], kwargs: dict[str, Any], context: ForwardContext
) -> Float[Tensor, "1 own hidden"]:
    """What leaves a layer for its last tokens, which it reads once more; its cache holds them as they are now."""
    own = hidden.shape[1]
    given = dict(kwargs) | {name: _last(kwargs[name], own, at) for name, at in BY_TOKEN.items() if name in kwargs}
    cached = kwargs["past_key_values"].layers[number]
    tokens = cached.get_seq_length()
    cached.crop(-own)
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = torch.ones(1, 1, own, tokens, dtype=torch.bool, device=hidden.device).tril(tokens - own)
    found = layer(hidden, **given | {"attention_mask": mask[..., -own:, :]}, mops=context)
    out: Tensor = found[0] if isinstance(found, tuple) else found
    return out


def _last(given: Any, own: int, at: int) -> Any:
    if isinstance(given, tuple):
        return tuple(_last(each, own, at) for each in given)
    return given if given is None else given.narrow(at, given.shape[at] - own, own)


def _config(engine: Any, context: ForwardContext) -> Any:
    return engine.wrapper_of(context.adapter).configs[context.adapter]


def _gate_layer(engine: Any, context: ForwardContext) -> int:
    layer: int | None = _config(engine, context).gate_layer
    return context.injection_layer if layer is None else layer
