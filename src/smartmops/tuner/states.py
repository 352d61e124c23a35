"""What the frozen half makes of packed text: hidden states, what the gate reads, keys and values before answers.

Knows halves of a backbone and packed batches. None of it depends on experts or gate, so it can be kept for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smartmops.adapter.config import MoPsConfig
from smartmops.attention.context import ForwardContext, Past
from smartmops.attention.packed import IGNORED, Packed, Segments, side_by_side, text_positions
from smartmops.backbone import halves
from smartmops.calls import reading
from smartmops.checks.errors import AdapterError
from smartmops.experts import gate

from .engine import Engine


def context(engine: Engine, batch: Packed) -> ForwardContext:
    """Where the segments of a batch lie, recovery prompts and what came before in front of them."""
    wrapper = engine.active()
    bare = ForwardContext(injection_layer=len(engine.layers))
    found = bare if wrapper is None else engine.context(wrapper.current, always=True)
    found.segments = Segments(batch.lengths.tolist(), batch.labels.device, batch.past_lengths)
    if batch.past_keys is not None:
        assert batch.past_values is not None and batch.past_lengths is not None
        found.past = Past(batch.past_keys, batch.past_values, batch.past_lengths, found.injection_layer)
    return found


def carrying(carried: ForwardContext) -> dict[str, Any]:
    """What a backbone is called with beside hidden states or token ids."""
    assert carried.segments is not None
    return carried.segments.inputs() | {"use_cache": False, "mops": carried}


def below(engine: Engine, batch: Packed) -> tuple[Float[Tensor, "tokens hidden"], Tensor | None]:
    """What enters the injection layer, and what the gate reads of each segment, [segments, inputs]."""
    wrapper = engine.active()
    first = len(engine.layers) if wrapper is None else wrapper.index
    if batch.hidden is not None and (wrapper is None or batch.pooled is not None):
        return batch.hidden, None if batch.pooled is None else batch.pooled.float()
    if wrapper is None:
        return _run(engine, batch, [first])[0], None
    config = wrapper.configs[wrapper.current]
    reads = config.gate_layer if config.reads_ahead and batch.pooled is None else first
    hidden, read = _run(engine, batch, [first, reads])
    return hidden, _pooled(batch, read, config)


def entering(
    wrapper: Any, adapter: str, layer: int, input_ids: Tensor, attention_mask: Tensor
) -> Float[Tensor, "batch seq hidden"]:
    """Of padded tokens, what enters `layer` where no text sees experts (recovery prompts in front, if any)."""
    engine = wrapper.engine
    carried = engine.context(adapter, always=True)
    carried.injection_layer = len(engine.layers)
    out = halves.lower(engine.backbone, layer)(input_ids=input_ids, attention_mask=attention_mask,
                                               position_ids=text_positions(attention_mask), use_cache=False,
                                               mops=carried)  # fmt: skip
    return out.last_hidden_state  # type: ignore[no-any-return]


@torch.no_grad()
def _run(
    engine: Engine, batch: Packed, at: list[int], recorded: dict[int, Any] | None = None, past: Past | None = None
) -> list[Float[Tensor, "tokens hidden"]]:
    """What enters the layers `at`, where no text sees experts; the batch's hidden states are what enters the first."""
    carried = context(engine, batch)
    carried.injection_layer, carried.recorded = len(engine.layers), recorded
    if past is not None:
        carried.past = past
        carried.segments = Segments(batch.lengths.tolist(), batch.labels.device, past.lengths)
    found, done = dict[int, Tensor](), 0
    if batch.hidden is not None:
        done = at[0]
        found[done] = batch.hidden
    for layer in sorted(set(at)):
        if layer in found:
            continue
        if done == 0 and not found:
            assert batch.input_ids is not None
            out = halves.lower(engine.backbone, layer)(input_ids=batch.input_ids[None], **carrying(carried))
        else:
            if layer < done:
                raise AdapterError(f"the gate reads what enters layer {layer}, but the batch holds what enters layer "
                                   f"{done}: give `pooled` of a packed batch")  # fmt: skip
            part = halves.middle(engine.backbone, done, layer)
            out = part(inputs_embeds=found[done][None], **carrying(carried))
        found[layer], done = out.last_hidden_state[0], layer
    return [found[layer] for layer in at]


def _pooled(
    batch: Packed, hidden: Float[Tensor, "tokens hidden"], config: MoPsConfig
) -> Float[Tensor, "segments inputs"]:
    """What the gate reads of each segment: given, or the mean over what `reading` lets it read."""
    if batch.pooled is not None:
        return batch.pooled.float()
    if config.embedding_size is not None:
        raise AdapterError(f"this adapter's gate reads an embedding of width {config.embedding_size} made by "
                           f"{config.embedder!r}: give those as `pooled` of a packed batch")  # fmt: skip
    segments = Segments(batch.lengths.tolist(), batch.labels.device)
    every = torch.ones_like(batch.labels, dtype=torch.bool)
    read = every if config.gate_input == "sequence" else _instruction(batch, config)
    return gate.pool(hidden[None], read, segments)


def _instruction(batch: Packed, config: MoPsConfig) -> Bool[Tensor, " tokens"]:
    """What the gate reads, by the rule for padded rows."""
    labels = batch.rows(batch.labels, IGNORED)
    real = batch.rows(torch.ones_like(batch.labels), 0).bool()
    ids = None if batch.input_ids is None else batch.rows(batch.input_ids, 0)
    start = None
    if config.visible_to == "answers":
        start = batch.starts() if ids is None else reading.answer_starts(ids, real, labels, config.answer_header)
    own = config.gate_reads == "own"
    frame = config.gate_frame if own and batch.gate_mask is None else None
    mask = reading.instruction(ids, real, labels, start, frame)
    if own and batch.gate_mask is not None:
        narrowed = mask & batch.rows(batch.gate_mask.long(), 0).bool()
        mask = torch.where(narrowed.any(-1, keepdim=True), narrowed, mask)
    return mask[real]


class Opening(NamedTuple):
    """What the bare base makes of the first tokens of texts, for all that begin with them."""

    keys: Float[Tensor, "layers kv_heads tokens key"]  # from the first layer up
    values: Float[Tensor, "layers kv_heads tokens value"]
    read: Float[Tensor, "tokens read"]  # what enters the layers that are read, side by side


@torch.no_grad()
def opening(engine: Engine, tokens: Int[Tensor, " tokens"], at: Sequence[int], layers: int) -> Opening:
    """The states of these tokens at the start of a text: in the first `layers`, and what enters the layers `at`."""
    batch = Packed(torch.tensor([len(tokens)]), torch.full_like(tokens, IGNORED), tokens)
    recorded: dict[int, Any] = {}
    *read, _ = _run(engine, batch, [*at, layers], recorded)
    keys, values = (torch.stack([recorded[layer][i][0].to(tokens.device) for layer in range(layers)]) for i in (0, 1))
    return Opening(keys, values, torch.cat(read, -1))


@torch.no_grad()
def entering_each(
    engine: Engine, batch: Packed, at: Sequence[int], openings: Sequence[Opening | None]
) -> Float[Tensor, "tokens read"]:
    """What enters the layers `at`, side by side; only what follows the openings (of these layers) is computed."""
    rest, past = _after(batch, openings)
    return _joined(torch.cat(_run(engine, rest, [*at], past=past), -1), rest, openings)


@torch.no_grad()
def gate_inputs(engine: Engine, batch: Packed, openings: Sequence[Opening | None]) -> Float[Tensor, "segments inputs"]:
    """What the gate reads of each segment, before standardisation."""
    wrapper = engine.active()
    assert wrapper is not None
    hidden = entering_each(engine, batch, [reads(wrapper)], openings)
    return _pooled(batch, hidden, wrapper.configs[wrapper.current])


def reads(wrapper: Any) -> int:
    """The layer whose input the gate reads."""
    config = wrapper.configs[wrapper.current]
    found: int = config.gate_layer if config.reads_ahead else wrapper.index
    return found


@torch.no_grad()
def answers(engine: Engine, batch: Packed, openings: Sequence[Opening | None] = ()) -> Packed:
    """Headers and answers alone, with what the bare base makes of the text before them in the upper layers.

    Where a segment begins with one of `openings` (one for each segment, or none at all), only what follows is computed,
    and only that stands in `past_keys` and `past_values`.

    Raises:
        AdapterError: an example has no answer, or nothing before it.
    """
    wrapper = engine.active()
    assert wrapper is not None and batch.input_ids is not None
    config, count = wrapper.configs[wrapper.current], len(engine.layers)
    recorded: dict[int, Any] = {}
    rest, past = _after(batch, openings)
    hidden, read, _ = _run(engine, rest, [wrapper.index, reads(wrapper), count], recorded, past)
    starts = batch.starts()
    if past is not None:
        starts = starts - past.lengths
    segments = Segments(rest.lengths.tolist(), rest.labels.device)
    own = segments.positions >= starts[segments.of]
    pairs = [recorded[layer] for layer in range(wrapper.index, count)]
    keys, values = (_before(torch.stack([pair[i][0] for pair in pairs]), segments, starts, own) for i in (0, 1))
    return Packed(
        lengths=rest.lengths - starts.to(rest.lengths.device), labels=rest.labels[own], hidden=hidden[own],
        pooled=_pooled(batch, _joined(read, rest, openings), config), headers=batch.headers, past_keys=keys,
        past_values=values, past_lengths=starts,
    )  # fmt: skip


def _after(batch: Packed, openings: Sequence[Opening | None]) -> tuple[Packed, Past | None]:
    """The tokens that follow the openings, and these as what came before them."""
    if not any(openings):
        return batch, None
    assert batch.input_ids is not None
    sizes = torch.tensor([len(each.read) if each else 0 for each in openings], device=batch.labels.device)
    keys = side_by_side([[each.keys] if each else [] for each in openings])
    values = side_by_side([[each.values] if each else [] for each in openings])
    segments = Segments(batch.lengths.tolist(), batch.labels.device)
    left = segments.positions >= sizes[segments.of]
    rest = replace(batch, lengths=batch.lengths - sizes.to(batch.lengths.device), labels=batch.labels[left],
                   input_ids=batch.input_ids[left], gate_mask=None)  # fmt: skip
    return rest, Past(keys, values, sizes, 0)


def _joined(
    read: Float[Tensor, "rest hidden"], rest: Packed, openings: Sequence[Opening | None]
) -> Float[Tensor, "tokens hidden"]:
    """What the gate may read of whole texts, end to end."""
    if not any(openings):
        return read
    own = torch.split(read, rest.lengths.tolist())
    return torch.cat([part for each, end in zip(openings, own, strict=True)
                      for part in ([each.read, end] if each else [end])])  # fmt: skip


def _before(
    columns: Float[Tensor, "layers kv_heads tokens width"], segments: Segments, starts: Tensor, own: Tensor
) -> Float[Tensor, "layers segments kv_heads longest width"]:
    """The columns that are not `own` to the answers, a padded row for each segment."""
    layers, heads, _, width = columns.shape
    longest = max(int(starts.max()), 1)
    table = columns.new_zeros(layers, len(starts) * longest, heads, width)
    index = (segments.of * longest + segments.positions)[~own]
    table[:, index] = columns[:, :, ~own].transpose(1, 2)
    return table.view(layers, len(starts), longest, heads, width).transpose(2, 3)
