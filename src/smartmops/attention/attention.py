"""Gated prefix attention: key, value and a bias per row, put before what an attention module already sees.

Knows transformers' attention registry. Knows no gate, no experts, no tokens. What a forward pass needs travels with it
as the keyword `mops` of every decoder layer, so nothing global is ever switched and a checkpointed layer, run again
during backward, finds what it was first run with. Some architectures do not pass keywords on to their attention: there
the layer leaves it in a context variable while its `forward` runs (`attached._handing_over`), one for each thread.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface

from . import merged
from .packed import Segments
from .passage import KeyValue, Passage, Record

NAME = "gated_prefix"
now: contextvars.ContextVar[Record | Passage | None] = contextvars.ContextVar("mopsnow", default=None)
SUPPORTED = ("sdpa", "eager")


def _additive(mask: Tensor | None, query: Tensor, keys: int) -> Float[Tensor, "rows heads queries keys"]:
    """Any mask transformers hands out, as numbers added to logits."""
    hide, queries = torch.finfo(query.dtype).min, query.shape[-2]
    if mask is None:
        # Left implicit: one decoding step, or an empty cache, whose columns behind the text are not filled.
        full = query.new_zeros(1, keys) if queries == 1 else query.new_full((queries, keys), hide).triu(1)
        return full[None, None]
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, hide)
    return mask[..., :keys].to(query.dtype)


def gated_prefix_attention(
    module: nn.Module,
    query: Float[Tensor, "rows heads queries head"],
    key: Float[Tensor, "rows kv_heads keys head"],
    value: Float[Tensor, "rows kv_heads keys width"],
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The module's own attention function over prefix and text: bias + logits on prefix columns, mask on text columns.

    Paper: M' (prompts are never masked for any token) and "scale the network's attention over the experts" by g.
    """
    # Still a keyword where something wraps the layer's `forward` (accelerate's hooks do); else left by the layer.
    mops: Record | Passage | None = kwargs.pop("mops", None) or now.get()
    layer: int = module.layer_idx  # type: ignore[assignment]
    if mops is not None and query.dtype != value.dtype:  # autocast: rotated in float32, beside values that were not
        query, key = query.to(value.dtype), key.to(value.dtype)
    if isinstance(mops, Record):
        mops.kv[layer] = (key, value)
    plain = not isinstance(mops, Passage) or (
        layer not in mops.prefix and layer not in mops.beside and mops.segments is None
    )
    if plain:
        return _inner(module)(module, query, key, value, attention_mask, **kwargs)
    assert isinstance(mops, Passage)
    weights: Tensor | None = None
    if mops.segments is not None:
        out = _over_segments(module, query, key, value, mops, mops.segments, layer, kwargs)
    elif mops.sees is None and mops.closed is None:
        mops.attended = True
        out, weights = _gated(module, query, key, value, attention_mask, mops, layer, kwargs)
    else:
        mops.attended = True
        out = _where_seen(module, query, key, value, attention_mask, mops, layer, kwargs)
    return out.contiguous(), weights  # as transformers' own functions leave it: some models take views of it


def _gated(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, mops: Passage, layer: int,
    kwargs: dict[str, Any],
) -> tuple[Float[Tensor, "rows queries heads width"], Tensor | None]:  # fmt: skip
    """Padded rows, all of whose tokens see the prompts."""
    seen, added = mops.prefix.get(layer), mops.added(layer, query, _scale(query, kwargs))
    weights: Tensor | None = None
    if seen is None:
        out, weights = _inner(module)(module, query, key, value, mask, **kwargs)
    elif _quick(module, query, key, value, mask, seen, kwargs):
        out = _rows(query, key, value, mask, mops, layer, _scale(query, kwargs))
    else:
        full = _additive(mask, query, key.shape[-2])
        out, weights = _behind(module, query, key, value, full, seen, kwargs)
    return out if added is None else out + added, weights


def _where_seen(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, mops: Passage, layer: int,
    kwargs: dict[str, Any],
) -> Float[Tensor, "rows queries heads width"]:  # fmt: skip
    """The base's own attention, bit for bit, for tokens that see no prompts; for others, the gated one."""
    text, _ = _inner(module)(module, query, key, value, mask, **kwargs)
    sees = mops.sees
    if sees is None:
        sees = torch.ones(len(query), query.shape[-2], dtype=torch.bool, device=query.device)
    if mops.closed is not None:
        sees = sees & ~mops.closed[:, None]
    if not sees.any():
        return text
    from_here = int(sees.any(0).nonzero()[0])  # columns before are alike in every row
    full = _additive(mask, query, key.shape[-2])
    full = full[..., from_here:, :] if full.shape[-2] > 1 else full
    gated, _ = _gated(module, query[:, :, from_here:], key, value, full, mops, layer, kwargs)
    chosen = torch.where(sees[:, from_here:, None, None], gated, text[:, from_here:])
    return torch.cat([text[:, :from_here], chosen], 1)


def _over_segments(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mops: Passage, segments: Segments, layer: int,
    kwargs: dict[str, Any],
) -> Float[Tensor, "1 tokens heads width"]:  # fmt: skip
    """Examples laid end to end, each over its own text, what came before it, and the prompts."""
    seen, added = mops.prefix.get(layer), mops.added(layer, query, _scale(query, kwargs), segments.of)
    mops.attended = mops.attended or seen is not None or added is not None
    if mops.taken is not None:
        mops.taken[layer] = (key, value)
    if mops.past is None and _mergeable(module, query, value, segments, seen, kwargs):
        out = _merge(query, key, value, segments, seen, _scale(query, kwargs))
        return out if added is None else out + added
    mask = segments.causal(kwargs.get("sliding_window"), query.dtype)
    query, key, value = (segments.pad(each) for each in (query, key, value))
    if mops.past is not None:
        own = layer - mops.first
        key = torch.cat([mops.past.keys[own].to(key.dtype), key], -2)
        value = torch.cat([mops.past.values[own].to(value.dtype), value], -2)
        before = segments.before(mops.past.lengths, mops.past.keys.shape[-2], kwargs.get("sliding_window"), query.dtype)
        mask = torch.cat([before, mask.expand(len(before), -1, -1, -1)], -1)
    out, _ = _behind(module, query, key, value, mask, seen, kwargs)
    out = segments.unpad(out)
    return out if added is None else out + added


def _scale(query: Tensor, kwargs: dict[str, Any]) -> float:
    """What logits are multiplied by: the model's own factor, or that of the textbook."""
    return float(kwargs.get("scaling") or query.shape[-1] ** -0.5)


def _quick(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seen: tuple[KeyValue, Tensor],
    kwargs: dict[str, Any],
) -> bool:
    """Whether `merged.rows` serves: inference on a CPU, one prefix for all rows, and a mask or none needed."""
    return (
        query.is_cpu
        and query.shape[-1] == value.shape[-1]
        and not torch.is_grad_enabled()
        and module.__dict__["mops_sdpa"]
        and not kwargs.get("dropout")
        and len(seen[0][0]) == 1
        and (mask is not None or query.shape[-2] in (1, key.shape[-2]))
    )


def _rows(
    query: Float[Tensor, "rows heads queries head"],
    key: Float[Tensor, "rows kv_heads keys head"],
    value: Float[Tensor, "rows kv_heads keys head"],
    mask: Tensor | None,
    mops: Passage,
    layer: int,
    scale: float,
) -> Float[Tensor, "rows queries heads head"]:
    times = query.shape[1] // key.shape[1]
    if layer not in mops.ready:
        (prefix_key, prefix_value), bias = mops.prefix[layer]
        mops.ready[layer] = merged.Ready.of(prefix_key, prefix_value, bias, len(query), times, scale, query.dtype)
    full = None if mask is None else _additive(mask, query, key.shape[-2])
    if query.shape[-2] == 1:
        return merged.step(query, key, value, full, mops.ready[layer], scale).transpose(1, 2)
    if times > 1:
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    return merged.rows(query, key, value, full, mops.ready[layer], scale).transpose(1, 2)


LONG = 32  # tokens: shorter segments are quicker padded than one by one


def _mergeable(
    module: nn.Module, query: Tensor, value: Tensor, segments: Segments, seen: tuple[KeyValue, Tensor] | None,
    kwargs: dict[str, Any],
) -> bool:  # fmt: skip
    """Whether the quick way for a CPU serves: one prefix for all, no window that cuts, no dropout, no softcapping."""
    window = kwargs.get("sliding_window")
    return (
        query.is_cpu
        and query.shape[-1] == value.shape[-1]
        and module.__dict__["mops_sdpa"]
        and not kwargs.get("dropout")
        and (window is None or window >= segments.longest)
        and (seen is None or len(seen[0][0]) == 1)
        and sum(segments.lengths) >= LONG * len(segments.lengths)
    )


def _merge(
    query: Float[Tensor, "1 heads tokens head"],
    key: Float[Tensor, "1 kv_heads tokens head"],
    value: Float[Tensor, "1 kv_heads tokens head"],
    segments: Segments,
    seen: tuple[KeyValue, Float[Tensor, "#segments prompts"]] | None,
    scale: float,
) -> Float[Tensor, "1 tokens heads head"]:
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    if seen is None:
        return merged.text_alone(query, key, value, segments, scale).transpose(1, 2)
    prefix_key, prefix_value = (each.to(query.dtype).repeat_interleave(times, 1) for each in seen[0])
    bias = seen[1].expand(len(segments.lengths), -1)
    return merged.attend(query, key, value, prefix_key, prefix_value, bias, segments, scale).transpose(1, 2)


def _inner(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    inner: Callable[..., tuple[Tensor, Tensor | None]] = module.__dict__["mops_inner"]
    return inner


def _behind(
    module: nn.Module,
    query: Float[Tensor, "rows heads queries head"],
    key: Float[Tensor, "rows kv_heads keys head"],
    value: Float[Tensor, "rows kv_heads keys value"],
    mask: Float[Tensor, "#rows _ queries keys"],
    seen: tuple[KeyValue, Float[Tensor, "#rows prompts"]] | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The module's own attention over prefix (if any) and text."""
    kwargs = {name: given for name, given in kwargs.items() if name != "is_causal"}
    if seen is None:
        return _inner(module)(module, query, key, value, mask, **kwargs)
    (prefix_key, prefix_value), bias = seen
    rows, queries, prompts, width = len(query), query.shape[-2], prefix_key.shape[-2], value.shape[-1]
    key = torch.cat([prefix_key.to(key.dtype).expand(rows, -1, -1, -1), key], -2)
    value = torch.cat([prefix_value.to(value.dtype).expand(rows, -1, -1, -1), value], -2)
    if bias.requires_grad and torch.is_grad_enabled() and module.__dict__["mops_sdpa"]:
        kwargs["scaling"] = _scale(query, kwargs)
        query, key, value = _carry(query, key, value, bias / kwargs["scaling"])
        mask = torch.cat([mask.new_zeros(1, 1, 1, 1).expand(*mask.shape[:-1], prompts), mask], -1)
        out, weights = _inner(module)(module, query, key, value, mask, **kwargs)
        return out[..., :width], weights
    mask = mask.expand(rows, -1, queries, -1)
    columns = bias.to(mask.dtype)[:, None, None, :].expand(rows, mask.shape[1], queries, prompts)
    return _inner(module)(module, query, key, value, torch.cat([columns, mask], -1), **kwargs)


def _carry(
    query: Float[Tensor, "rows heads queries head"],
    key: Float[Tensor, "rows kv_heads keys head"],
    value: Float[Tensor, "rows kv_heads keys value"],
    bias: Float[Tensor, "#rows prompts"],
) -> tuple[Tensor, Tensor, Tensor]:
    """The bias in one extra head dimension: query 1, prompt key the bias over the scale, text key 0.

    A mask that needs a gradient would send torch to its slow math kernel; so only head dimensions need one. Eight more
    of them, because kernels want multiples of eight.
    """
    rows, heads, keys, _ = key.shape
    lifted = bias.clamp(min=-(2.0**13)).to(key.dtype)  # exp(-2^13 * scale) is 0, and 2^13 still fits float16
    column = F.pad(lifted.expand(rows, -1), (0, keys - lifted.shape[1]))[:, None, :, None].expand(-1, heads, -1, -1)
    ones = query.new_ones(1, 1, 1, 1).expand(*query.shape[:-1], 1)
    key = F.pad(torch.cat([key, column], -1), (0, 7))
    return F.pad(torch.cat([query, ones], -1), (0, 7)), key, F.pad(value, (0, 8))


AttentionInterface.register(NAME, gated_prefix_attention)
