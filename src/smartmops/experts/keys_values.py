"""Experts that are keys and values of every layer, read off real text. No gate, no tasks, no files.

Nothing of them runs through the network: they stand where the cache of an earlier text would stand. So no architecture
is too odd for them, and a step has no gradient through the prompts' own pass.
"""

from __future__ import annotations

import contextvars
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from smartmops.attention.context import AddedPrefix, ForwardContext, KeyValue
from smartmops.backbone.halves import POSITIONS, device_of, layers_name
from smartmops.checks.errors import BaseModelError

from .gate import CLOSED
from .opened import Opened

PROBE = 16  # tokens whose keys and values show the shapes and the size of a base's own


@dataclass
class KeysValues:
    """Experts that are columns of every layer, in units of the size that a base's own have there.

    So a rate is relative to what it moves, in every layer, whatever optimiser and trainer are used.
    """

    injection_layer: int
    keys: Float[Tensor, "columns layers kv_heads key"]  # of experts, then shared ones
    values: Float[Tensor, "columns layers kv_heads value"]
    key_size: Float[Tensor, " layers"]
    value_size: Float[Tensor, " layers"]
    joint: bool  # whether they stand in one softmax with the text
    head_weight: Float[Tensor, "layers heads"] | None  # in a softmax of their own; None: in none

    def put(self, context: ForwardContext, opened: Opened) -> None:
        """See `opened.Experts`."""
        keys, values, bias = self.keys, self.values, torch.cat([opened.bias, opened.shared], -1)
        if not torch.is_grad_enabled():  # what no row sees need not be there
            live = (bias > CLOSED).any(0)
            if not bool(live.all()):
                keys, values, bias = keys[live], values[live], bias[:, live]
        sized = ((keys, self.key_size), (values, self.value_size))
        made = [(each * size[None, :, None, None]).permute(1, 2, 0, 3) for each, size in sized]
        for number, (key, value) in enumerate(zip(*made, strict=True)):
            layer = self.injection_layer + number
            if self.joint:
                context.put({layer: (key[None], value[None])}, bias)
            else:
                weight = None if self.head_weight is None else self.head_weight[number]
                context.added[layer] = [AddedPrefix(key[None], value[None], bias, opened.strength, weight)]


@dataclass
class Columns:
    """Keys and values of consecutive tokens in the layers from `first` up."""

    keys: Float[Tensor, "columns layers kv_heads key"]
    values: Float[Tensor, "columns layers kv_heads value"]

    @property
    def shape(self) -> list[int]:
        """Layers, key heads, width of a key, width of a value."""
        return [*self.keys.shape[1:], self.values.shape[-1]]


def learned_positions(backbone: Any) -> bool:
    """Whether positions are looked up in a table, which has no entry below 0."""
    tokens = backbone.get_input_embeddings()
    children = [child for name, child in backbone.named_children() if name not in POSITIONS]
    return len(children) < len(list(backbone.children())) or any(
        isinstance(child, nn.Embedding) and child is not tokens for child in children
    )


@torch.no_grad()
def observe(backbone: Any, first: int, ids: Int[Tensor, "1 tokens"], end: int | None = None) -> Columns:
    """Keys (rotated, as a cache holds them) and values of a text's tokens in the layers from `first` up.

    The text is placed so that token `end` (None: the one behind the last) has position 0: the tokens before it then
    stand just before a text that starts at 0. Rotary positions are relative, so nothing else changes. Where there are
    none below 0 (a table of positions, or Ministral 3, which scales queries by their logarithm) it starts at 0.

    Raises:
        BaseModelError: the layers' keys or values differ in shape.
    """
    count = ids.shape[1]
    at = torch.arange(count, device=ids.device)
    before = at if learned_positions(backbone) else at - (count if end is None else end)
    record = _record(backbone, ids, before)
    if before is not at and not all(bool(key.isfinite().all()) for key, _ in record.values()):
        record = _record(backbone, ids, at)
    layers = range(first, len(getattr(backbone, layers_name(backbone))))
    if missing := [layer for layer in layers if layer not in record]:
        raise BaseModelError(f"layer {missing[0]} of {type(backbone).__name__} left no keys and values, so it has no "
                             "usual attention: choose an injection_layer above it, or another model")  # fmt: skip
    pairs = [record[layer] for layer in layers]
    if len({(key.shape, value.shape) for key, value in pairs}) > 1:
        raise BaseModelError(f"the layers of {type(backbone).__name__} from {first} up have keys or values of "
                             "different shapes: choose experts='hidden_states'")  # fmt: skip
    keys, values = (torch.stack([pair[i][0] for pair in pairs]).permute(2, 0, 1, 3).float() for i in (0, 1))
    return Columns(keys, values)


def _record(backbone: Any, ids: Int[Tensor, "1 tokens"], at: Int[Tensor, " tokens"]) -> dict[int, KeyValue]:
    """Every layer's keys and values of a text whose tokens are `at` these positions."""
    kv: dict[int, KeyValue] = {}
    # A context of its own: transformers collects the text's `output_hidden_states` through a context variable.
    contextvars.Context().run(backbone, input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=at[None],
                              use_cache=False, mops=ForwardContext(recorded=kv))  # fmt: skip
    return kv


def probe(backbone: Any, first: int) -> Columns:
    """Columns of a few arbitrary tokens, past the first ones, which are attention sinks."""
    table = backbone.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(table.shape[0] if table.dim() > 1 else 2, (1, 2 * PROBE), generator=generator)
    found = observe(backbone, first, ids.to(device_of(backbone)))
    return Columns(found.keys[PROBE:], found.values[PROBE:])


def size(columns: Float[Tensor, "columns layers kv_heads width"]) -> Float[Tensor, " layers"]:
    """Root mean square in each layer; 1 where there is nothing to measure."""
    if columns.is_meta or not len(columns):
        return torch.ones(columns.shape[1])
    found = columns.pow(2).mean((0, 2, 3)).sqrt()
    return torch.where(found > 0, found, torch.ones_like(found))
