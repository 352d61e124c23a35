"""The first pass of `generate` over a padded batch, without its padding. Knows tokens, masks, caches; no prompts.

Linear layers see real tokens only, laid end to end (see packed.py); the cache and whoever asked get what padded rows
would have left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from smartmops.attention.context import ForwardContext
from smartmops.attention.packed import Segments, text_positions
from smartmops.backbone import growing

PADDING = 1 / 8  # of a batch, from which on it is worth the trouble
KNOWN = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "return_dict",
         "mops"}  # fmt: skip


def packable(model: nn.Module, names: list[str], kwargs: Mapping[str, Any], real: Any) -> bool:
    """Whether a first pass is the plain case; `real`, [rows, seq] or None, marks the tokens that are no padding.

    Plain: token ids padded on the left, positions counted over real tokens, only the last token's logits wanted, an
    empty cache that is ours, and one device.
    """
    if torch.is_grad_enabled() or kwargs.get("input_ids") is None or "position_ids" not in names or real is None:
        return False
    given = {name for name, value in kwargs.items() if value is not None and value is not False}
    keep, devices = kwargs.get("logits_to_keep"), getattr(model, "hf_device_map", {})
    if given - KNOWN or type(keep) is not int or keep != 1 or len(set(devices.values())) > 1:
        return False
    real = real.bool()
    if not growing.has_room(kwargs.get("past_key_values")) or not real[:, -1].all():
        return False
    if real.float().mean() > 1 - PADDING:
        return False
    at = kwargs["position_ids"]  # the engine's, where nobody gave any
    return bool(at.shape == real.shape) and torch.equal(at[real], text_positions(real)[real])


def pack(kwargs: Mapping[str, Any], real: Bool[Tensor, "rows seq"], context: ForwardContext) -> dict[str, Any]:
    """What the model is called with instead; the context learns where the rows lie."""
    context.segments = segments = Segments(real.sum(-1).tolist(), real.device)
    if context.gate_mask is not None:
        context.gate_mask = context.gate_mask[real]
    for layer in kwargs["past_key_values"].layers:
        layer.arriving = real
    return dict(kwargs) | {
        "input_ids": kwargs["input_ids"][real][None],
        **segments.inputs(),
        "logits_to_keep": real.sum(-1).cumsum(0) - 1,
    }


def unpack(output: Any, context: ForwardContext) -> Any:
    """Logits of each row's last token, a row each. From here on rows are padded, as the cache is."""
    context.segments = None
    output.logits = output.logits.transpose(0, 1)
    return output
