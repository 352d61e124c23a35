"""Attention over text, segment by segment, and over the prefix, once for all, merged by log-sum-exp. CPU kernels only.

Knows queries, keys and values. Nothing is padded, no key is copied for each row, and what causality hides is skipped.
What came before a segment takes no gradient, so none is computed for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .context import Ready
from .packed import Segments

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Before:
    """Keys and values of what came before one segment; query heads that share a key head are rows of one product."""

    key: Float[Tensor, "kv_heads tokens head"]
    value: Float[Tensor, "kv_heads tokens head"]
    scale: float

    def _grouped(self, x: Float[Tensor, "1 heads own last"]) -> Float[Tensor, "kv_heads rows last"]:
        return x.reshape(len(self.key), -1, x.shape[-1])

    def logits(self, query: Float[Tensor, "1 heads own head"]) -> Float[Tensor, "kv_heads rows tokens"]:
        """Scaled products, in float32."""
        return torch.bmm(self._grouped(query), self.key.transpose(1, 2)).float().mul_(self.scale)

    def merge(self, query: Tensor, out: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp over these tokens too, from those over the segment alone."""
        logits = self.logits(query)
        both = torch.logaddexp(text, logits.logsumexp(-1).view(text.shape))
        weights = (logits - self._grouped(both[..., None])).exp_().to(query.dtype)
        made = torch.bmm(weights, self.value).view(out.shape)
        return made + out * (text - both).exp().unsqueeze(-1).to(out.dtype), both

    def back(self, grad: Tensor, query: Tensor, both: Tensor, delta: Tensor) -> Tensor:
        """The queries' gradient, where `both` is the log-sum-exp over all and `delta` what all outputs take back."""
        weights = (self.logits(query) - self._grouped(both[..., None])).exp_()
        change = torch.bmm(self._grouped(grad), self.value.transpose(1, 2)).float() - self._grouped(delta)
        change = (self.scale * (weights * change)).to(query.dtype)
        return torch.bmm(change, self.key).view(query.shape)


class _Merged(torch.autograd.Function):
    """With text logits s_t and prefix logits s_p: out = e^(L_t - L) o_t + e^(s_p - L) v_p, L = log(e^L_t + e^L_p).

    The flash kernel's backward treats its own log-sum-exp as a constant and takes its output for all there is, so it
    is handed the merged ones (as in ring attention, Liu et al. 2023).
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, bias: Tensor,
        segments: Segments, scale: float, past: Sequence[Before],
    ) -> Tensor:  # fmt: skip
        out, text = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
        for number, part in enumerate(segments.slices()):
            own, seen = _flash(query[:, :, part], key[:, :, part], value[:, :, part], 0.0, True, scale=scale)
            if past:
                own, seen = past[number].merge(query[:, :, part], own, seen)
            out[:, :, part], text[:, :, part] = own, seen
        logits = _logits(query, prefix_key, bias, segments, scale)
        both = torch.logaddexp(text, logits.logsumexp(-1))
        weights = (logits - both.unsqueeze(-1)).exp_().to(query.dtype)
        out = out * (text - both).exp().unsqueeze(-1).to(out.dtype) + weights @ prefix_value
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, bias, out, both)
        ctx.segments, ctx.scale, ctx.past = segments, scale, past
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, prefix_key, prefix_value, bias, out, both = ctx.saved_tensors
        segments, scale, grad = ctx.segments, ctx.scale, grads[0]
        weights = (_logits(query, prefix_key, bias, segments, scale) - both.unsqueeze(-1)).exp_()
        delta = (grad * out).sum(-1, keepdim=True)
        change = weights * (grad @ prefix_value.transpose(-1, -2) - delta).float()
        in_bias = None
        if ctx.needs_input_grad[5]:
            in_bias = torch.zeros_like(bias).index_add_(0, segments.of, change.sum((0, 1)).to(bias.dtype))
        change, weights = (scale * change).to(query.dtype), weights.to(query.dtype)
        in_query, in_key, in_value = change @ prefix_key, torch.empty_like(key), torch.empty_like(value)
        if any(ctx.needs_input_grad[:3]):
            for number, part in enumerate(segments.slices()):
                found = _flash_backward(grad[:, :, part], query[:, :, part], key[:, :, part], value[:, :, part],
                                        out[:, :, part], both[:, :, part], 0.0, True, scale=scale)  # fmt: skip
                in_query[:, :, part] += found[0]
                in_key[:, :, part], in_value[:, :, part] = found[1:]
                if ctx.past:
                    ends = grad[:, :, part], query[:, :, part], both[:, :, part], delta[:, :, part]
                    in_query[:, :, part] += ctx.past[number].back(*ends)
        in_prefix_key, in_prefix_value = change.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ grad
        return in_query, in_key, in_value, in_prefix_key, in_prefix_value, in_bias, None, None, None


def _logits(query: Tensor, prefix_key: Tensor, bias: Tensor, segments: Segments, scale: float) -> Tensor:
    """[1, heads, tokens, prompts] float32: scaled products with the prompts' keys, and the bias of the segment."""
    logits = (query @ prefix_key.transpose(-1, -2)).float() * scale
    return logits + bias[segments.of].float()


def over_segments(
    query: Float[Tensor, "1 heads tokens head"],
    key: Float[Tensor, "1 kv_heads tokens head"],
    value: Float[Tensor, "1 kv_heads tokens head"],
    prefix: tuple[Tensor, Tensor, Tensor] | None,
    segments: Segments,
    scale: float,
    past: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Float[Tensor, "1 heads tokens head"]:
    """Each token over its segment up to itself, and over the prefix: key, value, and a bias for each segment or all.

    With a prefix also over keys, values and lengths of what came before each segment (`past`).
    """
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    if prefix is None:
        parts = [
            torch.nn.functional.scaled_dot_product_attention(
                query[:, :, part], key[:, :, part], value[:, :, part], is_causal=True, scale=scale
            )
            for part in segments.slices()
        ]
        return torch.cat(parts, 2)
    seen = (each.to(query.dtype).repeat_interleave(times, 1) for each in prefix[:2])
    bias = prefix[2].expand(len(segments.lengths), -1)
    before = [] if past is None else _before(*past, query.dtype, scale)
    out: Tensor = _Merged.apply(query, key, value, *seen, bias, segments, scale, before)  # type: ignore[no-untyped-call]
    return out


def _before(keys: Tensor, values: Tensor, lengths: Tensor, dtype: torch.dtype, scale: float) -> list[Before]:
    return [Before(key[:, :count].to(dtype), value[:, :count].to(dtype), scale)
            for key, value, count in zip(keys, values, lengths.tolist(), strict=True)]  # fmt: skip


def over_rows(
    query: Float[Tensor, "rows heads queries head"],
    key: Float[Tensor, "rows kv_heads keys head"],
    value: Float[Tensor, "rows kv_heads keys head"],
    mask: Float[Tensor, "#rows #heads #queries keys"] | None,
    prefix: Ready,
    scale: float,
) -> Float[Tensor, "rows heads queries head"]:
    """Without gradient: padded rows, or a step of decoding, over their text (`mask` None: causally) and the prefix.

    Query heads that share a key head are queries of one head to the prefix, whose keys all rows share; in a step of
    decoding to the text too. Both parts have a softmax of their own, and weigh by their log-sum-exp.
    """
    count, heads, queries, width = query.shape
    shared, times = key.shape[1], heads // key.shape[1]
    grouped = query.reshape(count, shared, times * queries, width)
    if queries == 1:
        text, seen = _flash(grouped, key, value, 0.0, False, attn_mask=mask, scale=scale)
    else:
        if times > 1:
            key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
        text, seen = _flash(query, key, value, 0.0, mask is None, attn_mask=mask, scale=scale)
        text, seen = text.reshape(grouped.shape), seen.reshape(grouped.shape[:-1])
    flat = grouped.transpose(0, 1).reshape(1, shared, -1, width)
    bias = prefix.bias if queries == 1 else prefix.bias.repeat_interleave(queries, 2)
    made, share = _flash(flat, prefix.key, prefix.value, 0.0, False, attn_mask=bias, scale=scale)
    share = share.view(shared, count, -1).transpose(0, 1)
    weight = (share - seen).sigmoid()[..., None].to(query.dtype)
    return torch.lerp(text, made.view(shared, count, -1, width).transpose(0, 1), weight).view(query.shape)
