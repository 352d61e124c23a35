"""A key-value cache that is written where it lies. Knows tensors, and transformers' cache. No prompts, no gate."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

SPARE = 64  # tokens of room at least; else a quarter of what is there, so that all copies together stay linear


class GrowingLayer(DynamicLayer):
    """What a `DynamicLayer` holds, in buffers with room at the end: a step writes its own columns and copies no others.

    A tensor that was handed out never changes: what is not the last view of a buffer (cropped, reordered, repeated) is
    copied to a new one. With gradients nothing is written in place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.buffers: dict[str, tuple[Tensor, Tensor]] = {}  # name -> buffer, the view of it that holds something
        self.arriving: Bool[Tensor, "rows tokens"] | None = None  # where the next tokens lie, if they come end to end

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append, and return all keys and values, [rows, kv_heads, tokens, head]; what came end to end, as it came."""
        if torch.is_grad_enabled():
            grown: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return grown
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.arriving is not None:
            self.keys = self._spread("keys", key_states, self.arriving)
            self.values = self._spread("values", value_states, self.arriving)
            self.arriving = None
            return key_states, value_states
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def _append(
        self, name: str, seen: Tensor, new: Float[Tensor, "rows kv_heads new head"]
    ) -> Float[Tensor, "rows kv_heads tokens head"]:
        start = seen.shape[-2] if seen.numel() else 0
        end = start + new.shape[-2]
        buffer, view = self.buffers.get(name, (None, None))
        if buffer is None or view is not seen or end > buffer.shape[-2] or _sealed(buffer):
            buffer = new.new_empty(*new.shape[:-2], _room(end), new.shape[-1])
            if start:
                buffer[..., :start, :] = seen
        buffer[..., start:end, :] = new
        return self._keep(name, buffer, end)

    def _spread(
        self, name: str, new: Float[Tensor, "1 kv_heads real head"], where: Bool[Tensor, "rows tokens"]
    ) -> Float[Tensor, "rows kv_heads tokens head"]:
        """Real tokens to their places, and zeros (which masks hide, but a product would not forgive NaN) elsewhere."""
        rows, end = where.shape
        buffer = new.new_zeros(rows, new.shape[1], _room(end), new.shape[-1])
        buffer.transpose(1, 2)[:, :end][where] = new[0].transpose(0, 1)
        return self._keep(name, buffer, end)

    def _keep(self, name: str, buffer: Tensor, end: int) -> Tensor:
        view = buffer[..., :end, :]
        self.buffers[name] = buffer, view
        return view

    def reset(self) -> None:
        """Forget everything."""
        self.buffers.clear()
        super().reset()


def _room(tokens: int) -> int:
    return tokens + max(SPARE, tokens // 4)


def _sealed(buffer: Tensor) -> bool:
    """What was made in inference mode cannot be written outside it."""
    return buffer.is_inference() and not torch.is_inference_mode_enabled()


def make_room(cache: Any) -> None:
    """Let the plain layers of an empty cache of transformers be written in place; others (sliding, offloaded) stay."""
    if isinstance(cache, Cache) and not cache.offloading and cache.get_seq_length() == 0:
        cache.layers[:] = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]


def has_room(cache: Any) -> bool:
    """Whether every layer is written in place."""
    return isinstance(cache, Cache) and bool(cache.layers) and all(type(x) is GrowingLayer for x in cache.layers)
