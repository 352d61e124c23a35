"""Gated prefix attention as a function of transformers' registry: who sees which columns.

Knows transformers' attention registry. Knows no gate, no experts, no tokens. What a forward pass needs travels with it
as the keyword `mops` of every decoder layer, so nothing global is ever switched and a checkpointed layer, run again
during backward, finds what it was first run with. Some architectures do not pass keywords on to their attention: there
the layer leaves it in a context variable while its `forward` runs (`attached._handing_over`), one for each thread.
"""

from __future__ import annotations

import contextvars
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface

from smartmops.checks.errors import BaseModelError

from .context import ForwardContext
from .kernels import Own, additive, attend

NAME = "gated_prefix"
now: contextvars.ContextVar[ForwardContext | None] = contextvars.ContextVar("mopsnow", default=None)
SUPPORTED = ("sdpa", "eager")


def refuse(used: str) -> None:
    """Refuse an implementation that takes no bias of its own for each row.

    Raises:
        BaseModelError: it is one.
    """
    if used not in SUPPORTED:
        raise BaseModelError(f"attn_implementation={used!r} cannot carry a gate on attention logits: load the model "
                             'with attn_implementation="sdpa" or "eager", or set one of them by '
                             "set_attn_implementation")  # fmt: skip


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
    context: ForwardContext | None = kwargs.pop("mops", None) or now.get()
    own = Own(module, kwargs)
    if context is None:
        return own(query, key, value, attention_mask)
    refuse(own.native.used)  # it may have been changed since the adapter was made
    if query.dtype != value.dtype:  # autocast: rotated in float32, beside values that were not
        query, key = query.to(value.dtype), key.to(value.dtype)
    if context.recorded is not None:
        context.recorded[own.layer] = (key, value)
    columns = own.layer in context.prefix or own.layer in context.added
    context.attended = context.attended or columns
    if not columns and context.segments is None:
        return own(query, key, value, attention_mask)
    everywhere = context.visible is None and context.base_rows is None
    over = _gated if everywhere or context.segments is not None else _where_visible
    out, weights = over(own, query, key, value, attention_mask, context)
    return out.contiguous(), weights  # as transformers' own functions leave it: some models take views of it


def _gated(
    own: Own, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, context: ForwardContext
) -> tuple[Float[Tensor, "rows queries heads width"], Tensor | None]:
    """All tokens see the prompts."""
    segments, past = context.segments, context.past
    of = None if segments is None else segments.of
    added = [each.output(query, own.scale(query), of) for each in context.added.get(own.layer, [])]
    before = None if past is None else past.of(own.layer)
    prefix = context.prefix.get(own.layer)
    if prefix is not None and segments is None:
        mask = _numbers(mask, query, key.shape[-2], context)
    out, weights = attend(own, query, key, value, mask, prefix, segments, before)
    return out + sum(added[1:], added[0]) if added else out, weights


def _numbers(mask: Tensor | None, query: Tensor, keys: int, context: ForwardContext) -> Tensor | None:
    """A mask of truth values as numbers, made once for all layers that it is handed to."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    if context.mask is None or context.mask[0] is not mask or context.mask[1].dtype != query.dtype:
        context.mask = mask, additive(mask, query, keys)
    return context.mask[1]


def _where_visible(
    own: Own, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, context: ForwardContext
) -> tuple[Float[Tensor, "rows queries heads width"], None]:
    """The base's own attention, bit for bit, for tokens that see no prompts; for others, the gated one."""
    text, _ = own(query, key, value, mask)
    visible, first = context.seeing(len(query), query.shape[-2], query.device)
    if first == query.shape[-2]:
        return text, None
    full = additive(_numbers(mask, query, key.shape[-2], context), query, key.shape[-2])
    full = full[..., first:, :] if full.shape[-2] > 1 else full
    gated, _ = _gated(own, query[:, :, first:], key, value, full, context)
    chosen = torch.where(visible.to(query.device)[:, first:, None, None], gated, text[:, first:])
    return torch.cat([text[:, :first], chosen], 1), None


AttentionInterface.register(NAME, gated_prefix_attention)
