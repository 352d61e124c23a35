"""Rows of a batch that decodes under one adapter: others join them, and some leave. Knows caches, masks and contexts.

What the gate has read of each row is kept, so a joined batch has the columns that each row had before. No text, no
sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache

from smartmops.attention.context import ForwardContext
from smartmops.backbone import following, growing
from smartmops.calls import mixed

from .engine import Engine


@dataclass
class Rows:
    """A batch between two tokens."""

    cache: Any
    mask: Int[Tensor, "rows tokens"]  # 0: padding, on the left
    pooled: Float[Tensor, "rows inputs"]  # what the gate has read of each row; zeros of the base's own
    told: Float[Tensor, "rows experts"]  # weights that the caller told; NaN: the gate decides
    base: Bool[Tensor, " rows"]  # rows that no expert serves

    @classmethod
    def begun(cls, cache: Any, mask: Tensor, told: Tensor, base: Tensor) -> Rows:
        """The rows of a first pass."""
        context: ForwardContext = cache.mops
        parts = [(part.rows, part.context) for part in context.parts] or [(torch.arange(len(mask)), context)]
        read = [(at, own.pooled) for at, own in parts if own.pooled is not None]
        pooled = torch.zeros(len(mask), read[0][1].shape[1] if read else 0, device=mask.device)
        for at, own in read:
            pooled[at.to(pooled.device)] = own.to(pooled)
        return cls(cache, mask, pooled, told, base)

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def open(self) -> bool:
        """Whether rows can join or leave: no layer's cache forgets, as those of sliding windows do."""
        return growing.has_room(self.cache)


def step(model: Any, rows: Rows, tokens: Int[Tensor, " rows"]) -> Float[Tensor, "rows vocabulary"]:
    """Logits of the token after `tokens`, which each row takes in."""
    rows.mask = F.pad(rows.mask, (0, 1), value=1)
    names = rows.cache.mops.row_adapters
    given: dict[str, Any] = {} if names is None else {"adapter_names": names}
    out = model(input_ids=tokens[:, None], attention_mask=rows.mask, past_key_values=rows.cache, use_cache=True,
                logits_to_keep=1, **given)  # fmt: skip
    found: Tensor = out.logits[:, -1]
    return found


def joined(model: Any, adapter: str, some: Sequence[Rows]) -> Rows:
    """All rows in one batch, the shorter ones padded on the left."""
    longest = max(rows.mask.shape[1] for rows in some)
    width = max(rows.pooled.shape[1] for rows in some)
    pads = [longest - rows.mask.shape[1] for rows in some]
    layers = [[rows.cache.layers[i] for rows in some] for i in range(len(some[0].cache.layers))]
    cache = _cache([tuple(_stacked([getattr(layer, name) for layer in own], pads) for name in ("keys", "values"))
                    for own in layers])  # fmt: skip
    found = Rows(
        cache,
        torch.cat([F.pad(rows.mask, (pad, 0)) for rows, pad in zip(some, pads, strict=True)]),
        torch.cat([F.pad(rows.pooled, (0, width - rows.pooled.shape[1])) for rows in some]),
        torch.cat([rows.told for rows in some]),
        torch.cat([rows.base for rows in some]),
    )
    following.put(cache, _context(model, adapter, found))
    return found


def kept(model: Any, adapter: str, rows: Rows, stay: Sequence[int]) -> Rows:
    """The rows that stay, without columns that are padding in all of them."""
    at = torch.tensor(stay, device=rows.mask.device)
    mask = rows.mask[at]
    first = int(mask.any(0).nonzero()[0])
    cache = _cache([tuple(each[at][:, :, first:] for each in (layer.keys, layer.values))
                    for layer in rows.cache.layers])  # fmt: skip
    found = Rows(cache, mask[:, first:], rows.pooled[at], rows.told[at], rows.base[at])
    following.put(cache, _context(model, adapter, found))
    return found


def _stacked(parts: Sequence[Tensor], pads: Sequence[int]) -> Float[Tensor, "rows kv_heads tokens head"]:
    return torch.cat([F.pad(each, (0, 0, pad, 0)) if pad else each for each, pad in zip(parts, pads, strict=True)])


def _cache(pairs: Sequence[Any]) -> Any:
    """A cache of transformers that holds these keys and values, layer by layer, and is written in place."""
    cache = DynamicCache()
    for number, (key, value) in enumerate(pairs):
        layer = growing.GrowingLayer()
        cache.layers.append(layer)
        cache.update(key, value, number)
    return cache


def _context(model: Any, adapter: str, rows: Rows) -> ForwardContext:
    """Whose gate reads again what it has read of each row; rows of the base see no columns."""
    engine = Engine.on(model)
    if rows.base.all():
        context = ForwardContext(injection_layer=len(engine.layers), attended=True)
    else:
        context = engine.context(adapter)
        context.pooled, context.gate_weights = rows.pooled, rows.told
    if rows.base.any():
        context.row_adapters = [mixed.BASE if base else adapter for base in rows.base.tolist()]
        context.leave_to_base(rows.base)
    return context
