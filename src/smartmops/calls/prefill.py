"""The first pass of `generate`: without padding, and once where answers alone see experts. Tokens, masks and caches.

Linear layers see real tokens only, laid end to end (see packed.py); the cache and whoever asked get what padded rows
would have left. Where answers alone see experts, the pass is the bare base's own: gates read what goes by, and only the
tokens from the answer's header on are read again, with experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from smartmops.attention.context import ForwardContext, Reading
from smartmops.attention.packed import Segments, text_positions
from smartmops.backbone import growing

PADDING = 1 / 8  # of a batch, from which on it is worth the trouble
KNOWN = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "return_dict",
         "mops"}  # fmt: skip


def plain(model: Any, names: list[str], kwargs: Mapping[str, Any], real: Bool[Tensor, "rows seq"]) -> bool:
    """Whether a first pass is the plain case; `real` marks the tokens that are no padding.

    Plain: token ids padded on the left, positions counted over real tokens, only the last token's logits wanted, an
    empty cache that is ours, and one device.
    """
    if torch.is_grad_enabled() or kwargs.get("input_ids") is None or "position_ids" not in names:
        return False
    if getattr(kwargs.get("attention_mask"), "ndim", 2) != 2:  # it may say more than where padding is
        return False
    given = {name for name, value in kwargs.items() if value is not None and value is not False}
    keep, devices = kwargs.get("logits_to_keep"), getattr(model, "hf_device_map", {})
    if given - KNOWN or type(keep) is not int or keep != 1 or len(set(devices.values())) > 1:
        return False
    if not growing.has_room(kwargs.get("past_key_values")) or not real[:, -1].all():
        return False
    at = kwargs.get("position_ids")  # the engine's, where nobody gave any and there is padding
    return at is None or (bool(at.shape == real.shape) and torch.equal(at[real], text_positions(real)[real]))


def last_alone(model: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of a pass, where it wants the last token's logits alone: the head gets that token as one block.

    As a slice of all tokens it is none, and in 16 bits a CPU then copies the head's weights for every row.
    """
    found, keep, halved = dict(kwargs), kwargs.get("logits_to_keep"), model.dtype in (torch.bfloat16, torch.float16)
    if type(keep) is int and keep == 1 and halved and model.device.type == "cpu":
        found["logits_to_keep"] = torch.tensor([-1])
    return found


def distinct(
    kwargs: Mapping[str, Any], real: Bool[Tensor, "rows seq"]
) -> tuple[dict[str, Any], tuple[Bool[Tensor, "others seq"], Int[Tensor, " rows"]] | None]:
    """A pass over rows each of which is there once, which of them are real, and which of them each row was.

    So several answers to one question, beams, and experts that answer side by side read it once. None: no two rows are
    the same.
    """
    if len(real) == 1:
        return dict(kwargs), None
    _, each = torch.unique(torch.where(real, kwargs["input_ids"], -1), dim=0, return_inverse=True)
    count = int(each.max()) + 1
    if count == len(real):
        return dict(kwargs), None
    numbers = torch.arange(len(each), device=each.device)
    first = numbers.new_full((count,), len(each)).scatter_reduce(0, each, numbers, "amin")
    rows = ("input_ids", "attention_mask", "position_ids")
    once = {name: kwargs[name][first] for name in rows if kwargs.get(name) is not None}
    return {**kwargs, **once}, (real[first], each)


def thin(real: Bool[Tensor, "rows seq"]) -> bool:
    """Whether so much of a batch is padding that to leave it out is worth the trouble."""
    return bool(real.float().mean() <= 1 - PADDING)


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


def again(model: Any, reading: Reading, output: Any) -> Any:
    """Read each row from its answer's header on, now with experts; rows that see none keep what the bare base said.

    The cache then holds what it would had experts been there from the start, for tokens before the header see none.
    """
    text, given = reading.text, reading.given
    shut = torch.zeros(len(reading.real), dtype=torch.bool, device=reading.real.device)
    if text.base_rows is not None:
        shut = text.base_rows.to(shut.device)
    left = text.null_weight is not None and bool((text.null_weight >= 1).all())
    if text.visible_from is None or left or bool(shut.all()):
        return output
    first = int(text.visible_from[~shut].min())
    given["past_key_values"].crop(first - reading.real.shape[1])
    ends = ("input_ids", "position_ids")
    rest = {name: given[name][:, first:] for name in ends if given.get(name) is not None}
    found = model(**{**given, **rest, "return_dict": True})
    output.logits = torch.where(shut[:, None, None].to(found.logits.device), output.logits, found.logits)
    return output
