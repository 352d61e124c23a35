"""Key/value experts computed by hand: one explicit softmax in every layer, in plain torch. Imports nothing of the library.

The reference is a plain model whose attention function is the naive one below; what it shall see stands in `Seen`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

HIDE = -1e30


@dataclass
class Seen:
    """Of the layers from `first` up: keys and values [columns, layers, kv_heads, d], bias [rows, columns]."""

    first: int
    keys: Tensor
    values: Tensor
    bias: Tensor
    how: str  # joint, separate or linear
    strength: Tensor  # [rows]
    sees: Tensor  # [rows, seq]
    heads: Tensor | None = None  # [layers, heads]


_seen: list[Seen | None] = [None]


def naive(module, query, key, value, attention_mask, scaling=None, **_):
    heads, width = query.shape[1], query.shape[-1]
    times = heads // key.shape[1]
    scale = scaling if scaling is not None else width**-0.5
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    text = query @ key.transpose(-1, -2) * scale
    text = text + attention_mask
    seen, layer = _seen[0], module.layer_idx
    if seen is None or layer < seen.first:
        return (text.softmax(-1) @ value).transpose(1, 2), None
    own = layer - seen.first
    k, v = (each[:, own].transpose(0, 1).repeat_interleave(times, 0) for each in (seen.keys, seen.values))
    bias = seen.bias[:, None, None, :].masked_fill(~seen.sees[:, None, :, None], HIDE)
    if seen.how == "joint":
        both = torch.cat([query @ k.transpose(-1, -2) * scale + bias, text], -1).softmax(-1)
        return (both[..., : k.shape[-2]] @ v + both[..., k.shape[-2] :] @ value).transpose(1, 2), None
    out = text.softmax(-1) @ value
    open_ = seen.sees[:, None, :, None].float()
    if seen.how == "separate":
        weight = seen.heads[own].tanh()[None, :, None, None] * seen.strength[:, None, None, None] * open_
        logits = query @ k.transpose(-1, -2) * scale + seen.bias[:, None, None, :]
        return (out + weight * (logits.softmax(-1) @ v)).transpose(1, 2), None
    query, k = (F.elu(F.rms_norm(each, each.shape[-1:])) + 1 for each in (query, k))
    share = seen.bias.softmax(-1) * seen.strength[:, None]
    alike = query @ k.transpose(-1, -2) / width * share[:, None, None, :]
    return (out + open_ * (alike @ v)).transpose(1, 2), None


AttentionInterface.register("naive_kv", naive)


def pooled(plain: PreTrainedModel, layer: int, ids: Tensor, mask: Tensor, read: Tensor) -> Tensor:
    """Mean of what enters a layer of the bare model, over the tokens in `read`."""
    at = (mask.cumsum(-1) - 1).clamp(min=0)
    hidden = plain(input_ids=ids, attention_mask=mask, position_ids=at, output_hidden_states=True).hidden_states[layer]
    return (hidden * read[..., None]).sum(1) / read.sum(1, keepdim=True)


def logits(plain: PreTrainedModel, seen: Seen | None, ids: Tensor, mask: Tensor) -> Tensor:
    before, _seen[0] = plain.config._attn_implementation, seen
    plain.config._attn_implementation = "naive_kv"
    try:
        at, count = (mask.cumsum(-1) - 1).clamp(min=0), ids.shape[1]
        gone = torch.ones(count, count, dtype=torch.bool).triu(1) | (mask == 0)[:, None, None]
        gone = gone & ~torch.eye(count, dtype=torch.bool)  # padding sees itself, so that it sees something
        full = torch.zeros(gone.shape).masked_fill(gone, HIDE)
        return plain(input_ids=ids, attention_mask=full, position_ids=at, use_cache=False).logits
    finally:
        plain.config._attn_implementation, _seen[0] = before, None
