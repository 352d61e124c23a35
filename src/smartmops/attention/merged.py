"""Attention over text, segment by segment, and over the prefix, once for all, merged by log-sum-exp. CPU kernels only.

Knows queries, keys and values. Nothing is padded, no key is copied for each row, and what causality hides is skipped.
What came before a segment takes no gradient, so none is computed for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .context import CLOSED, Ready
from .packed import Segments

SHORT = 128  # tokens of a segment up to which plain products are quicker than flash, forward and backward together

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Products:
    """Keys and values by plain products, in which query heads that share a key head are rows of one."""

    key: Float[Tensor, "kv_heads keys head"]
    value: Float[Tensor, "kv_heads keys head"]
    own: int  # the last keys, which take gradients
    bias: Float[Tensor, "tokens keys"] | None  # added to logits
    scale: float

    def _grouped(self, x: Float[Tensor, "1 heads tokens last"]) -> Float[Tensor, "kv_heads queries last"]:
        return x.reshape(len(self.key), -1, x.shape[-1])

    def _logits(self, query: Float[Tensor, "1 heads tokens head"]) -> Float[Tensor, "kv_heads queries keys"]:
        found = torch.bmm(self._grouped(query), self.key.transpose(1, 2)).float().mul_(self.scale)
        if self.bias is not None:
            found.view(len(found), -1, *self.bias.shape).add_(self.bias)
        return found

    def over(self, query: Float[Tensor, "1 heads tokens head"]) -> tuple[Tensor, Float[Tensor, "1 heads tokens"]]:
        """Output and log-sum-exp."""
        logits = self._logits(query)
        top = logits.amax(-1, keepdim=True)
        weights = logits.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        out = torch.bmm(weights.to(query.dtype), self.value).div_(total)
        return out.view(query.shape), total.log_().add_(top).view(query.shape[:-1])

    def back(self, grad: Tensor, query: Tensor, both: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of queries, own keys and own values, and of the logits, [kv_heads, queries, keys].

        `both` is the log-sum-exp over all that the queries see, `delta` the sum of its gradient's products with it.
        """
        first, grad = self.key.shape[1] - self.own, self._grouped(grad)
        weights = self._logits(query).sub_(self._grouped(both[..., None])).exp_()
        change = torch.bmm(grad, self.value.transpose(1, 2)).float().sub_(self._grouped(delta)).mul_(weights)
        scaled = (self.scale * change).to(query.dtype)
        in_key = torch.bmm(scaled[..., first:].transpose(1, 2), self._grouped(query))
        in_value = torch.bmm(weights[..., first:].to(query.dtype).transpose(1, 2), grad)
        return torch.bmm(scaled, self.key).view(query.shape), in_key, in_value, change


@dataclass(frozen=True)
class Text:
    """What one segment sees of text: itself, causally, and what came before it."""

    flash: tuple[Float[Tensor, "1 heads own head"], Float[Tensor, "1 heads own head"]] | None  # itself, if it is long
    products: Products | None  # the rest
    scale: float

    def over(self, query: Float[Tensor, "1 heads own head"]) -> tuple[Tensor, Float[Tensor, "1 heads own"]]:
        """Output and log-sum-exp."""
        parts = [] if self.products is None else [self.products.over(query)]
        if self.flash is not None:
            parts.append(_flash(query, *self.flash, 0.0, True, scale=self.scale))
        return parts[0] if len(parts) == 1 else _merge(*parts)

    def back(
        self, grad: Tensor, query: Tensor, both: Tensor, delta: Tensor, out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, own keys and own values; `out` too is over all that the queries see."""
        rest = None if self.products is None else self.products.back(grad, query, both, delta)
        if self.flash is None:
            assert rest is not None
            return rest[:3]
        found = _flash_backward(grad, query, *self.flash, out, both, 0.0, True, scale=self.scale)
        return found[0] if rest is None else found[0] + rest[0], *found[1:]


def _mixed(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """Outputs of two softmaxes, each with its log-sum-exp, as that of one over both."""
    weight = (other[1] - one[1]).sigmoid_().unsqueeze(-1).to(one[0].dtype)
    return torch.lerp(one[0], other[0], weight)


def _merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`_mixed`, and the log-sum-exp over both."""
    return _mixed(one, other), torch.logaddexp(one[1], other[1])


def _texts(
    key: Float[Tensor, "1 kv_heads tokens head"], value: Float[Tensor, "1 kv_heads tokens head"], times: int,
    segments: Segments, scale: float, past: tuple[Tensor, Tensor, Tensor] | None,
) -> list[Text]:  # fmt: skip
    """Of each segment, where `times` query heads share a key head."""
    counts = [0] * len(segments.lengths) if past is None else past[2].tolist()
    found = []
    for number, (part, count) in enumerate(zip(segments.slices(), counts, strict=True)):
        length, keys, values = segments.lengths[number], key[:, :, part], value[:, :, part]
        before = None if past is None else [each[number, :, :count].to(key.dtype) for each in past[:2]]
        if length <= SHORT:
            seen = [keys[0], values[0]]
            if before is not None:
                seen = [torch.cat(each, 1) for each in zip(before, seen, strict=True)]
            found.append(Text(None, Products(seen[0], seen[1], length, segments.later(length, count), scale), scale))
        else:
            rest = None if before is None or not count else Products(before[0], before[1], 0, None, scale)
            found.append(Text((keys.repeat_interleave(times, 1), values.repeat_interleave(times, 1)), rest, scale))
    return found


def _columns(key: Tensor, value: Tensor, bias: Tensor, segments: Segments, scale: float) -> Products:
    """Of the prefix, which every token sees by the bias of its segment."""
    return Products(key[0], value[0], key.shape[2], bias[segments.of].float().clamp(min=CLOSED), scale)


class _Merged(torch.autograd.Function):
    """With text logits s_t and prefix logits s_p: out = e^(L_t - L) o_t + e^(L_p - L) o_p, L = log(e^L_t + e^L_p).

    The flash kernel's backward treats its own log-sum-exp as a constant and takes its output for all there is, so it
    is handed the merged ones (as in ring attention, Liu et al. 2023), and so are plain products.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, bias: Tensor,
        segments: Segments, scale: float, past: tuple[Tensor, Tensor, Tensor] | None,
    ) -> Tensor:  # fmt: skip
        text = query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=torch.float32)
        texts = _texts(key, value, query.shape[1] // key.shape[1], segments, scale, past)
        for part, own in zip(segments.slices(), texts, strict=True):
            text[0][:, :, part], text[1][:, :, part] = own.over(query[:, :, part])
        prefix = _columns(prefix_key, prefix_value, bias, segments, scale)
        out, both = _merge(prefix.over(query), text)
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, bias, out, both)
        ctx.segments, ctx.scale, ctx.past = segments, scale, past
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, prefix_key, prefix_value, bias, out, both = ctx.saved_tensors
        segments, scale, grad = ctx.segments, ctx.scale, grads[0]
        delta = (grad * out).sum(-1, keepdim=True).float()
        prefix = _columns(prefix_key, prefix_value, bias, segments, scale)
        in_query, in_prefix_key, in_prefix_value, change = prefix.back(grad, query, both, delta)
        in_bias = None
        if ctx.needs_input_grad[5]:
            each = change.view(-1, len(segments.of), change.shape[-1]).sum(0)
            in_bias = torch.zeros_like(bias).index_add_(0, segments.of, each.to(bias.dtype))
        in_key, in_value = torch.empty_like(key), torch.empty_like(value)
        if any(ctx.needs_input_grad[:3]):
            texts = _texts(key, value, query.shape[1] // key.shape[1], segments, scale, ctx.past)
            for part, own in zip(segments.slices(), texts, strict=True):
                found = own.back(*(each[:, :, part] for each in (grad, query, both, delta, out)))
                in_query[:, :, part] += found[0]
                in_key[0, :, part], in_value[0, :, part] = (_shared(each, key.shape[1]) for each in found[1:])
        return in_query, in_key, in_value, in_prefix_key[None], in_prefix_value[None], in_bias, None, None, None


def _shared(gradient: Float[Tensor, "*one heads own head"], kv_heads: int) -> Float[Tensor, "kv_heads own head"]:
    """Of what query heads share, the sum."""
    return gradient.view(kv_heads, -1, *gradient.shape[-2:]).sum(1)


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
    if prefix is None:
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
        parts = [
            torch.nn.functional.scaled_dot_product_attention(
                query[:, :, part], key[:, :, part], value[:, :, part], is_causal=True, scale=scale
            )
            for part in segments.slices()
        ]
        return torch.cat(parts, 2)
    seen, bias = (each.to(query.dtype) for each in prefix[:2]), prefix[2].expand(len(segments.lengths), -1)
    out: Tensor = _Merged.apply(query, key, value, *seen, bias, segments, scale, past)  # type: ignore[no-untyped-call]
    return out


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
    other = made.view(shared, count, -1, width).transpose(0, 1), share.view(shared, count, -1).transpose(0, 1)
    return _mixed((text, seen), other).view(query.shape)
