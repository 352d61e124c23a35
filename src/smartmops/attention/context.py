"""The object that travels with a forward pass: prompt columns of each layer, and which tokens see them. Not the gate.

It belongs to one call and goes where the call's cache goes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .packed import Segments

KeyValue = tuple[
    Float[Tensor, "#rows kv_heads prompts key"], Float[Tensor, "#rows kv_heads prompts value"]
]  # one row serves all


CLOSED = -1e30  # for the logit of a column that a row does not see: of nothing but -inf there is no log-sum-exp


@dataclass
class Ready:
    """A layer's prefix as every step of a generation wants it."""

    key: Float[Tensor, "1 kv_heads prompts head"]
    value: Float[Tensor, "1 kv_heads prompts head"]
    bias: Float[Tensor, "1 1 queries prompts"]  # of each row, as often as query heads share a key head; float32


@dataclass
class Prefix:
    """Columns of one layer in the softmax over its text, and the bias that the gate adds to the logits over them."""

    key: Float[Tensor, "#rows kv_heads prompts key"]
    value: Float[Tensor, "#rows kv_heads prompts value"]
    bias: Float[Tensor, "#rows prompts"]
    kept: Ready | None = None

    def ready(self, query: Float[Tensor, "rows heads queries head"]) -> Ready:
        """Made for the first query and kept: one row of keys and values for all."""
        if self.kept is None:
            times = query.shape[1] // self.key.shape[1]
            bias = self.bias.float().clamp(min=CLOSED).expand(len(query), -1).repeat_interleave(times, 0)
            self.kept = Ready(self.key.to(query.dtype), self.value.to(query.dtype), bias[None, None])
        return self.kept


@dataclass
class AddedPrefix:
    """Columns that text attends to outside the softmax over text; their output is added to the text's.

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

    def output(
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
    first: int  # layer that the first of `layers` is

    def of(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and lengths for one layer."""
        return self.keys[layer - self.first], self.values[layer - self.first], self.lengths


Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional arguments, and those by keyword
T = TypeVar("T")
BY_ROW = (
    "pooled",
    "text",
    "gate_weights",
    "gate",
    "null_weight",
    "visible_from",
    "base_rows",
)  # what is held of each row


def _whole(kind: type[T]) -> type[T]:
    """A dataclass that torch does not take for one.

    FSDP rebuilds every dataclass among a layer's arguments, and what the layer leaves on such a copy is lost.
    """
    del kind.__dataclass_fields__  # type: ignore[attr-defined]
    return kind


@_whole
@dataclass
class ForwardContext:
    """Carried by a pass as the keyword `mops` of every decoder layer.

    A pass of prompts fills `recorded` and nothing else. In a pass of text the gate's input is `pooled`, or, where that
    is not known before the injection layer, the mean over `gate_mask` of what enters it; from it the injection layer
    fills `gate`, `prefix` and `added`.
    """

    adapter: str = ""
    injection_layer: int = -1  # -1 in a pass of prompts; the number of layers where no gate is to be read
    gate_mask: Tensor | None = None  # [rows, seq], or [tokens] of segments: what the gate may read
    pooled: Float[Tensor, "rows inputs"] | None = None  # the gate's input
    text: Int[Tensor, "rows seq"] | None = None  # the tokens that `gate` rests on; -1: it does not; None: on none
    gate_weights: Float[Tensor, "rows experts"] | None = None  # given by the caller; NaN: the gate decides
    gate: Float[Tensor, "rows groups"] | None = None
    null_weight: Float[Tensor, " rows"] | None = None  # None: there is no null expert
    prefix: dict[int, Prefix] = field(default_factory=dict)  # by layer
    added: dict[int, list[AddedPrefix]] = field(default_factory=dict)  # by layer
    attended: bool = False  # whether any attention module has seen the columns
    visible_from: Int[Tensor, " rows"] | None = None  # column from which on text sees prompts; None: all of it does
    visible: Bool[Tensor, "rows seq"] | None = None  # the same for the tokens of this very pass; None: all
    base_rows: Bool[Tensor, " rows"] | None = None  # rows that see no prompts at all; None: all see some
    segments: Segments | None = None  # where the text is one row of several examples laid end to end
    past: Past | None = None  # of the segments
    recorded: dict[int, KeyValue] | None = None  # where every layer leaves its keys and values, if they are wanted
    scale: Float[Tensor, "rows prompts 1"] | None = None  # hidden states are multiplied by this before every layer
    row_adapters: list[str] | None = None  # the adapter of each row, where not all are served by `adapter`
    parts: list[Part] = field(default_factory=list)  # those adapters' rows (see mixed.py)
    reading: Reading | None = None  # of a pass by the bare base, what gates read as it goes by
    seen: tuple[Any, ...] | None = None  # what `seeing` found last, behind what it found it from
    mask: tuple[Tensor, Tensor] | None = None  # of truth values, and the same as numbers

    def __deepcopy__(self, memo: Any) -> ForwardContext:
        """Of a copied cache: nothing that is held is ever written to, so only the shells are new."""
        found = copy.copy(self)
        found.prefix, found.added = dict(self.prefix), dict(self.added)
        return found

    def put(self, kv: dict[int, KeyValue], bias: Float[Tensor, "#rows prompts"]) -> None:
        """Add prompt columns to the layers in `kv`."""
        for layer, (key, value) in kv.items():
            if (seen := self.prefix.get(layer)) is None:
                self.prefix[layer] = Prefix(key, value, bias)
            else:
                rows = max(len(seen.bias), len(bias))
                joined = torch.cat([seen.bias.expand(rows, -1), bias.expand(rows, -1)], 1)
                self.prefix[layer] = Prefix(_join(seen.key, key), _join(seen.value, value), joined)

    def of_rows(self, change: Callable[[Tensor], Tensor]) -> ForwardContext:
        """For a cache whose rows were reordered, repeated or left out by `change`; nothing that is held is written to.

        Beams trade places at every step, but with those of the same text, for which nothing changes: then what layers
        keep from step to step stays. Parts go, for the whole batch has what they put in front of layers.
        """
        done: dict[int, tuple[Tensor, Tensor]] = {}  # by what was there: layers share a bias

        def own(each: Tensor) -> Tensor:
            if id(each) not in done:
                done[id(each)] = each, change(each)
            return done[id(each)][1]

        def some(each: Tensor) -> Tensor:
            return own(each) if len(each) > 1 else each  # one serves all rows

        found, at = copy.copy(self), self.row_adapters
        for name in BY_ROW:
            if (value := getattr(self, name)) is not None:
                setattr(found, name, own(value))
        if at is not None:
            found.row_adapters = [at[row] for row in change(torch.arange(len(at))).tolist()]
        found.prefix = {n: Prefix(some(each.key), some(each.value), some(each.bias)) for n, each in self.prefix.items()}
        found.added = {n: [replace(each, bias=some(each.bias), strength=some(each.strength)) for each in columns]
                       for n, columns in self.added.items()}  # fmt: skip
        if found.row_adapters == at and all(torch.equal(was, now) for was, now in done.values()):
            return self
        found.gate_mask, found.visible, found.seen, found.parts = None, None, None, []
        return found

    def leave_to_base(self, rows: Bool[Tensor, " rows"]) -> None:
        """Close all prompts to these rows too."""
        if bool(rows.any()):
            self.base_rows = rows if self.base_rows is None else self.base_rows.to(rows.device) | rows

    def seeing(self, rows: int, queries: int, device: torch.device) -> tuple[Bool[Tensor, "rows queries"], int]:
        """Which tokens of a pass see prompts, and the first column in which one does; `queries` where none does.

        Worked out once for all layers: to ask a GPU is to wait for it.
        """
        if self.seen is None or not (
            self.seen[0] is self.visible and self.seen[1] is self.base_rows and self.seen[2] == (rows, queries)
        ):
            visible = self.visible
            if visible is None:
                visible = torch.ones(rows, queries, dtype=torch.bool, device=device)
            if self.base_rows is not None:
                visible = visible & ~self.base_rows.to(visible.device)[:, None]
            columns = visible.any(0).nonzero()[:, 0].tolist()
            found = visible, columns[0] if columns else queries
            self.seen = self.visible, self.base_rows, (rows, queries), found
        return self.seen[3]  # type: ignore[no-any-return]

    def look(self, past: int, length: int) -> None:
        """Work out which of the tokens in columns `past`.. of this pass see prompts."""
        self.visible = None
        if self.visible_from is not None and past < int(self.visible_from.max()):
            columns = torch.arange(past, past + length, device=self.visible_from.device)
            self.visible = columns >= self.visible_from[:, None]


@dataclass
class Part:
    """The rows of a batch that one adapter serves."""

    rows: Int[Tensor, " own"]
    context: ForwardContext


@dataclass
class Reading:
    """A pass by the bare base over a text whose answer alone sees prompts: gates read what enters their layers."""

    text: ForwardContext  # whose gates are to be read
    given: Mapping[str, Any]  # what the model was called with, by name
    real: Bool[Tensor, "rows seq"]
    heard: dict[int, Tensor | None]  # layer -> what enters it
    calls: dict[int, Call | None] = field(default_factory=dict)  # what layers are called with, of those to be kept
    turn: tuple[int, Callable[[Call], Call | None]] | None = None  # the layer before which prompts may come in, and how
    turned: bool = False  # whether they did, so that this pass has read the answer's header too
    distinct: tuple[Bool[Tensor, "others seq"], Int[Tensor, " rows"]] | None = None
    """of rows of which some are the same: those that the pass is over, and which of them each row is"""

    def arriving(self, layer: int, call: Call) -> Call:
        """What a layer is to be called with, given what it was called with."""
        if layer in self.heard:
            self.heard[layer] = call[0][0] if call[0] else call[1]["hidden_states"]
        if layer in self.calls:
            self.calls[layer] = call
        if self.turn is not None and self.turn[0] == layer:
            found = self.turn[1](call)
            self.turned = found is not None
            return found or call
        return call

    def hidden(self, layer: int, segments: Segments | None) -> Float[Tensor, "rows seq hidden"]:
        """What entered a layer; of a pass without padding, with zeros for it."""
        found = self.heard[layer]
        assert found is not None
        real, each = self.distinct or (self.real, None)
        if segments is not None:
            padded = found.new_zeros(*real.shape, found.shape[-1])
            padded[real.to(found.device)] = found[0]
            found = padded
        return found if each is None else found[each.to(found.device)]


def _features(x: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape width"]:
    return F.elu(F.rms_norm(x.float(), x.shape[-1:])) + 1


def _join(left: Tensor, right: Tensor) -> Tensor:
    rows = max(len(left), len(right))
    return torch.cat([left.expand(rows, -1, -1, -1), right.expand(rows, -1, -1, -1)], -2)
