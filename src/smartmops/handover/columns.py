"""One expert, pinned, as the columns of keys and values that each layer puts before the text. Writes no files.

A pinned expert is a fixed prefix: it depends on no input. A uniform gate leaves attention as it is, so the weight 1 of
one of E experts is E times the attention its columns would have by themselves. What has no bias to add to attention
logits carries that by E copies of each column, which is the same sum.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from smartmops.attention.attached import attention_modules
from smartmops.backbone.halves import layers_name
from smartmops.checks.errors import RunError
from smartmops.experts.gate import CLOSED
from smartmops.tuner.engine import Engine


@dataclass
class Columns:
    """Of one layer; keys are rotated for a text whose first token is at position 0."""

    keys: Float[Tensor, "columns kv_heads key"]
    values: Float[Tensor, "columns kv_heads value"]
    log_weights: Float[Tensor, " columns"]  # added to attention logits, in nats

    def repeated(self) -> Columns:
        """The same with no weights: each column as often as its weight says.

        Raises:
            ValueError: a weight is no whole number.
        """
        weights = self.log_weights.double().exp()
        copies = weights.round()
        if bool(((weights - copies).abs() > 1e-4 * copies).any()) or bool((copies < 1).any()):
            raise RunError(f"a column has the weight {float(weights.min()):.4f}, which no number of copies is: "
                             "choose --format kv")  # fmt: skip
        times = copies.long()
        keys, values = self.keys.repeat_interleave(times, 0), self.values.repeat_interleave(times, 0)
        return Columns(keys, values, torch.zeros(len(keys)))


@torch.no_grad()
def pinned(model: Any, inputs: dict[str, Tensor]) -> dict[int, Columns]:
    """The columns of each layer that has any, when a text is read with one expert pinned.

    Args:
        model: Adapted, in eval mode.
        inputs: One row as `generate` takes it, with `gate_weights`. What it says does not matter.

    Raises:
        ValueError: columns stand outside the softmax over text.
    """
    model(**inputs)
    context = Engine.on(model).latest
    assert context is not None
    if context.added:
        raise RunError("experts outside the softmax over text are no prefix: train with prefix_attention='joint'")
    found = {}
    for layer, prefix in sorted(context.prefix.items()):
        seen = prefix.bias[0] > CLOSED / 2
        keys, values = (each[0].transpose(0, 1)[seen].float().cpu() for each in (prefix.key, prefix.value))
        found[layer] = Columns(keys, values, prefix.bias[0][seen].float().cpu())
    return found


@torch.no_grad()
def moved(backbone: Any, layer: int, keys: Float[Tensor, "columns kv_heads key"], by: int) -> Tensor:
    """Rotated keys, for a text whose first token is at position `by` instead of 0.

    Rotary positions are relative, so prefix and text move together.

    Raises:
        ValueError: positions of this base are not rotary in transformers' usual way.
    """
    rotary = getattr(backbone, "rotary_emb", None)
    module = next(attention_modules(getattr(backbone, layers_name(backbone))[layer]), None)
    turn = None if module is None else getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if rotary is None or turn is None:
        raise RunError(f"{type(backbone).__name__} has no rotary positions, so a prefix cannot move with the text: "
                         "choose --format kv")  # fmt: skip
    kind = {}
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        kind["layer_type"] = backbone.config.layer_types[layer]
    own = keys.transpose(0, 1)[None].float()
    cos, sin = (each.float() for each in rotary(own, torch.full((1, 1), by), **kind))
    scale = (cos.pow(2) + sin.pow(2)).mean().sqrt()  # some kinds of rotary positions lengthen what they turn
    width = cos.shape[-1] if cos.shape[-1] <= own.shape[-1] else own.shape[-1]
    _, turned = turn(own[..., :width], own[..., :width], cos / scale, sin / scale)
    return torch.cat([turned, own[..., width:]], -1)[0].transpose(0, 1)
