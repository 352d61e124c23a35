"""What a forward pass carries to its attention modules: prompt columns, who sees them, what came before. No gate.

It belongs to one call and goes where the call's cache goes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from . import merged
from .packed import Segments

KeyValue = tuple[
    Float[Tensor, "#rows kv_heads prompts key"], Float[Tensor, "#rows kv_heads prompts value"]
]  # one row serves all

T = TypeVar("T")


def _whole(kind: type[T]) -> type[T]:
    """A dataclass that torch does not take for one.

    FSDP rebuilds every dataclass among a layer's arguments, and what the layer leaves on such a copy is lost.
    """
    del kind.__dataclass_fields__  # type: ignore[attr-defined]
    return kind


@_whole
@dataclass
class Record:
    """Carried by the prompts' own pass: every attention module leaves its (rotated) keys and values here."""

    scale: Float[Tensor, "rows prompts 1"] | None = None  # prompt columns are multiplied by this before every layer
    kv: dict[int, KeyValue] = field(default_factory=dict)  # layer index -> key, value


@dataclass
class Beside:
    """Prompt columns that text attends to outside the softmax over text; their output is added to the text's.

    With a weight per head, in a softmax of their own: `tanh(w_h) * strength * softmax(q k + bias) v`, where `w` starts
    at zero (LLaMA-Adapter, Zhang et al. 2023). Without one, linearly: `strength * sum_n b_n phi(q) phi(k_n) / d v_n`
    with b = softmax(bias), phi(x) = elu(x / rms(x)) + 1, where `v` starts at zero (PrefixMemory-Tuning, arXiv
    2506.13674, where phi(x) = elu(x) + 1 and b_n = 1: a rate would be as large as a model's own queries and keys are).
    """

    key: Float[Tensor, "1 kv_heads prompts key"]
    value: Float[Tensor, "1 kv_heads prompts value"]
    bias: Float[Tensor, "rows prompts"]
    strength: Float[Tensor, " rows"]  # share of the gate that went to any column at all
    weight: Float[Tensor, " heads"] | None = None

    def of(
        self, query: Float[Tensor, "rows heads queries key"], scale: float, segment: Tensor | None = None
    ) -> Float[Tensor, "rows queries heads value"]:
        """What is added; `segment` says for each query of one packed row which row of `bias` is its own."""
        times = query.shape[1] // self.key.shape[1]
        key, value = (each.to(query.dtype).repeat_interleave(times, 1) for each in (self.key, self.value))
        bias, strength = self.bias[:, None, None, :], self.strength[:, None, None, None]
        if segment is not None:
            bias, strength = self.bias[segment][None, None], self.strength[segment][None, None, :, None]
        if self.weight is None:
            alike = _features(query) @ _features(key).transpose(-1, -2) / query.shape[-1]
            return ((alike * (bias.float().softmax(-1) * strength)).to(query.dtype) @ value).transpose(1, 2)
        logits = (query @ key.transpose(-1, -2)).float() * scale + bias.float()
        heads = self.weight.float().tanh()[None, :, None, None] * strength.float()
        return ((logits.softmax(-1) * heads).to(query.dtype) @ value).transpose(1, 2)


@dataclass
class Past:
    """What the bare base made of the tokens before each segment: they see no prompts, and nothing is trained there."""

    keys: Float[Tensor, "layers segments kv_heads longest key"]  # padded on the right
    values: Float[Tensor, "layers segments kv_heads longest value"]
    lengths: Int[Tensor, " segments"]


@_whole
@dataclass
class Passage:
    """Carried by a pass of text: what each layer sees in front of it."""

    adapter: str
    first: int  # injection layer
    gate_mask: Tensor | None = None  # [rows, seq], or [tokens] of segments: what the gate may read
    gate_embedding: Tensor | None = None  # [rows, embedding]: read instead of the model's own hidden states
    pooled: Float[Tensor, "rows inputs"] | None = None  # what the gate has read
    gate: Float[Tensor, "rows groups"] | None = None
    lost: Float[Tensor, " rows"] | None = None  # weight of the null expert; None: there is none
    prefix: dict[int, tuple[KeyValue, Float[Tensor, "rows prompts"]]] = field(default_factory=dict)
    beside: dict[int, list[Beside]] = field(default_factory=dict)
    attended: bool = False  # whether any attention module has seen the prefix
    ready: dict[int, merged.Ready] = field(default_factory=dict)  # the prefix once more, as inference wants it
    segments: Segments | None = None  # where the text is one row of several examples laid end to end
    past: Past | None = None  # of the segments
    taken: dict[int, KeyValue] | None = None  # where layers leave the keys and values of segments, if wanted
    start: Int[Tensor, " rows"] | None = None  # column from which on text sees prompts; None: all of it does
    sees: Bool[Tensor, "rows seq"] | None = None  # the same for the tokens of this very pass; None: all
    gate_weights: Float[Tensor, "rows experts"] | None = None  # told; NaN: the gate decides
    closed: Bool[Tensor, " rows"] | None = None  # rows that see no prompts at all; None: all see some
    names: list[str] | None = None  # the adapter of each row, where not all are served by `adapter`
    parts: list[Part] = field(default_factory=list)  # those adapters' rows (see mixed.py)

    def __deepcopy__(self, memo: Any) -> Passage:
        """Of a copied cache: nothing that is held is ever written to, so only the shells are new."""
        found = copy.copy(self)
        found.prefix, found.beside, found.ready = dict(self.prefix), dict(self.beside), dict(self.ready)
        return found

    def put(self, kv: dict[int, KeyValue], bias: Float[Tensor, "#rows prompts"]) -> None:
        """Add prompt columns to the layers in `kv`."""
        self.ready.clear()
        for layer, (key, value) in kv.items():
            if layer in self.prefix:
                (seen_key, seen_value), seen_bias = self.prefix[layer]
                key, value = _join(seen_key, key), _join(seen_value, value)
                rows = max(len(seen_bias), len(bias))
                joined = torch.cat([seen_bias.expand(rows, -1), bias.expand(rows, -1)], 1)
                self.prefix[layer] = (key, value), joined
            else:
                self.prefix[layer] = (key, value), bias

    def added(
        self, layer: int, query: Float[Tensor, "rows heads queries key"], scale: float, segment: Tensor | None = None
    ) -> Tensor | None:
        """What the columns beside the softmax over text add to a layer's output; None where there are none."""
        found = [each.of(query, scale, segment) for each in self.beside.get(layer, [])]
        return sum(found[1:], found[0]) if found else None

    def look(self, past: int, length: int) -> None:
        """Work out which of the tokens in columns `past`.. of this pass see prompts."""
        self.sees = None
        if self.start is not None and past < int(self.start.max()):
            self.sees = torch.arange(past, past + length, device=self.start.device) >= self.start[:, None]


@dataclass
class Part:
    """The rows of a batch that one adapter serves."""

    rows: Int[Tensor, " own"]
    passage: Passage


def _features(x: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape width"]:
    return F.elu(F.rms_norm(x.float(), x.shape[-1:])) + 1


def _join(left: Tensor, right: Tensor) -> Tensor:
    rows = max(len(left), len(right))
    return torch.cat([left.expand(rows, -1, -1, -1), right.expand(rows, -1, -1, -1)], -2)
