"""`attend`: attention over prompt columns and text, by the quickest kernel that serves. Knows no gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import merged
from .context import Prefix
from .packed import Segments

LONG = 32  # tokens: shorter segments are quicker padded than one by one


@dataclass(frozen=True)
class Native:
    """What an attention module had before it was attached: the config that names its function, now and if it changes.

    A model makes its masks for the function that its config names (`set_attn_implementation`), and another function
    takes them wrongly: no mask at all is causal to one and shows everything to the other.
    """

    eager: Callable[..., tuple[Tensor, Tensor | None]] | None  # what the module's own file computes step by step
    config: Any

    @property
    def used(self) -> str:
        """The name of the function."""
        return self.config._attn_implementation  # type: ignore[no-any-return]

    @property
    def function(self) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """The function."""
        if self.used == "eager" and self.eager is not None:
            return self.eager
        return ALL_ATTENTION_FUNCTIONS[self.used]  # type: ignore[no-any-return]

    @property
    def sdpa(self) -> bool:
        """Whether it is torch's own."""
        return self.used == "sdpa"


@dataclass(frozen=True)
class Own:
    """The attention of a module by itself, with the options of one call (scaling, dropout, sliding window, ...)."""

    module: nn.Module
    options: dict[str, Any]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Its output, and its weights where it has them."""
        return self.native.function(self.module, query, key, value, mask, **self.options)

    @property
    def native(self) -> Native:
        """Its function."""
        return self.module.mops_native  # type: ignore[return-value]

    @property
    def layer(self) -> int:
        """The number of its decoder layer."""
        return self.module.layer_idx  # type: ignore[return-value]

    def scale(self, query: Tensor) -> float:
        """What logits are multiplied by: the model's own factor, or that of the textbook."""
        return float(self.options.get("scaling") or query.shape[-1] ** -0.5)

    def merges(self, query: Tensor, value: Tensor, prefix: Prefix | None) -> bool:
        """Whether the kernels of `merged` serve: a CPU, one prefix for all rows, no dropout, no softcapping."""
        return (
            query.is_cpu
            and query.shape[-1] == value.shape[-1]
            and self.native.sdpa
            and not self.options.get("dropout")
            and (prefix is None or len(prefix.key) == 1)
        )


def attend(
    own: Own,
    query: Float[Tensor, "rows heads queries head"],
    key: Float[Tensor, "rows kv_heads keys head"],
    value: Float[Tensor, "rows kv_heads keys width"],
    mask: Tensor | None,
    prefix: Prefix | None,
    segments: Segments | None = None,
    past: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Float[Tensor, "rows queries heads width"], Tensor | None]:
    """Attention over the prefix (if any) and what `mask` shows of the text; and its weights, where they are made.

    With `segments`, one row of examples laid end to end, each over its own text (the mask goes unread) and over
    keys, values and lengths of what came before it (`past`).
    """
    if segments is not None:
        return _over_segments(own, query, key, value, prefix, segments, past), None
    if prefix is None:
        return own(query, key, value, mask)
    whole = mask is not None or query.shape[-2] in (1, key.shape[-2])
    if whole and not torch.is_grad_enabled() and own.merges(query, value, prefix):
        full = None if mask is None else additive(mask, query, key.shape[-2])
        return merged.over_rows(query, key, value, full, prefix.ready(query), own.scale(query)).transpose(1, 2), None
    return _in_front(own, query, key, value, additive(mask, query, key.shape[-2]), prefix)


def additive(mask: Tensor | None, query: Tensor, keys: int) -> Float[Tensor, "rows heads queries keys"]:
    """Any mask transformers hands out, as numbers added to logits."""
    hide, queries = torch.finfo(query.dtype).min, query.shape[-2]
    if mask is None:
        # Left implicit: one decoding step, or an empty cache, whose columns behind the text are not filled.
        full = query.new_zeros(1, keys) if queries == 1 else query.new_full((queries, keys), hide).triu(1)
        return full[None, None]
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, hide)
    return mask[..., :keys].to(query.dtype)


def _over_segments(
    own: Own, query: Tensor, key: Tensor, value: Tensor, prefix: Prefix | None, segments: Segments,
    past: tuple[Tensor, Tensor, Tensor] | None,
) -> Float[Tensor, "1 tokens heads width"]:  # fmt: skip
    long, window = sum(segments.lengths) >= LONG * len(segments.lengths), own.options.get("sliding_window")
    longest = segments.longest + (0 if past is None else past[0].shape[-2])
    serves = long if past is None else prefix is not None
    if serves and (window is None or window >= longest) and own.merges(query, value, prefix):
        found = None if prefix is None else (prefix.key, prefix.value, prefix.bias)
        return merged.over_segments(query, key, value, found, segments, own.scale(query), past).transpose(1, 2)
    mask = segments.causal(window, query.dtype)
    query, key, value = (segments.pad(each) for each in (query, key, value))
    if past is not None:
        keys, values, lengths = past
        key, value = torch.cat([keys.to(key.dtype), key], -2), torch.cat([values.to(value.dtype), value], -2)
        before = segments.before(lengths, keys.shape[-2], window, query.dtype)
        mask = torch.cat([before, mask.expand(len(before), -1, -1, -1)], -1)
    return segments.unpad(_in_front(own, query, key, value, mask, prefix)[0])


def _in_front(
    own: Own,
    query: Float[Tensor, "rows heads queries head"],
    key: Float[Tensor, "rows kv_heads keys head"],
    value: Float[Tensor, "rows kv_heads keys value"],
    mask: Float[Tensor, "#rows _ queries keys"],
    prefix: Prefix | None,
) -> tuple[Tensor, Tensor | None]:
    """The module's own attention over keys and values with the prefix (if any) in front."""
    options = {name: given for name, given in own.options.items() if name != "is_causal"}
    own = replace(own, options=options)
    if prefix is None:
        return own(query, key, value, mask)
    rows, queries, prompts, width = len(query), query.shape[-2], prefix.key.shape[-2], value.shape[-1]
    key = torch.cat([prefix.key.to(key.dtype).expand(rows, -1, -1, -1), key], -2)
    value = torch.cat([prefix.value.to(value.dtype).expand(rows, -1, -1, -1), value], -2)
    if prefix.bias.requires_grad and torch.is_grad_enabled() and own.native.sdpa:
        options["scaling"] = own.scale(query)
        query, key, value = _carry(query, key, value, prefix.bias / options["scaling"])
        mask = torch.cat([mask.new_zeros(1, 1, 1, 1).expand(*mask.shape[:-1], prompts), mask], -1)
        out, weights = own(query, key, value, mask)
        return out[..., :width], weights
    mask = mask.expand(rows, -1, queries, -1)
    columns = prefix.bias.to(mask.dtype)[:, None, None, :].expand(rows, mask.shape[1], queries, prompts)
    return own(query, key, value, torch.cat([columns, mask], -1))


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
