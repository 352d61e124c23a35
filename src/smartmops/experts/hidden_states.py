"""Expert and recovery prompts in, their keys and values in every layer out. No text, no gate but a given scale."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from smartmops.attention.context import ForwardContext, KeyValue
from smartmops.backbone.halves import layers_name, upper

from .opened import Opened


@dataclass
class HiddenStates:
    """Prompts that enter at a layer and run through it and all later ones, as the paper's experts and recovery prompts.

    They never see the text, so one row serves every batch (M' of the paper); only under a `scale` per row (Algorithm 1:
    columns times g before every layer) is there a row for each input.
    """

    backbone: nn.Module
    first: int  # layer where they enter
    prompts: Float[Tensor, "prompts hidden"]
    experts: int = 1
    isolated: bool = False  # whether the prompts of an expert attend to each other alone; else to all earlier ones
    shared: Float[Tensor, "shared hidden"] | None = None

    def put(self, context: ForwardContext, opened: Opened) -> None:
        """See `opened.Experts`."""
        context.put(self.columns(opened.scale), opened.bias)
        if self.shared is not None:
            context.put(HiddenStates(self.backbone, self.first, self.shared).columns(), opened.shared)

    def columns(self, scale: Float[Tensor, "rows prompts"] | None = None) -> dict[int, KeyValue]:
        """Run the prompts alone through the layers, and collect their keys and values.

        They stand just before the text, which starts at 0: every isolated expert at -P..-1, all others at -K..-1.
        """
        apart = self.isolated and scale is None  # then every expert is a row of its own: nothing masked is computed
        width, device = len(self.prompts) // self.experts, self.prompts.device
        dtype = next(p.dtype for p in self.backbone.parameters() if p.is_floating_point())
        rows = self.experts if apart else 1 if scale is None else len(scale)
        columns = self.prompts.view(rows, width, -1) if apart else self.prompts.expand(rows, -1, -1)
        place = torch.arange(columns.shape[1], device=device)
        see = torch.ones(len(place), len(place), dtype=torch.bool, device=device).tril()
        if self.isolated:
            see = see & (place[:, None] // width == place // width)
        at = place % width - width if self.isolated else place - len(place)
        mask = torch.zeros(see.shape, dtype=dtype, device=device).masked_fill(~see, torch.finfo(dtype).min)
        kv: dict[int, KeyValue] = {}
        with _no_checkpointing(self.backbone):
            # A context of its own: transformers collects the text's `output_hidden_states` through a context variable.
            contextvars.Context().run(
                upper(self.backbone, self.first),
                inputs_embeds=columns.to(dtype),
                attention_mask=mask[None, None].expand(rows, 1, -1, -1),
                position_ids=at[None].expand(rows, -1),
                use_cache=False,
                mops=ForwardContext(recorded=kv, scale=None if scale is None else scale.to(dtype).unsqueeze(-1)),
            )

        _gather_again(self.backbone, kv)

        def in_a_row(each: Tensor) -> Tensor:  # one expert after another
            return each.transpose(0, 1).flatten(1, 2)[None]

        return {layer: (in_a_row(key), in_a_row(value)) for layer, (key, value) in kv.items()} if apart else kv


def _gather_again(backbone: nn.Module, kv: dict[int, KeyValue]) -> None:
    """Of a layer that FSDP keeps in parts, gather the weights before gradients come back through what it recorded.

    FSDP's own hooks are on what a layer returns, and keys and values leave it sideways.
    """
    layers: Any = getattr(backbone, layers_name(backbone))
    for number, pair in kv.items():
        sharded = next((m for m in layers[number].modules() if isinstance(m, FSDPModule)), None)
        for each in pair if sharded is not None else ():
            if each.requires_grad:
                each.register_hook(lambda gradient, sharded=sharded: sharded.unshard())  # type: ignore[no-untyped-call]


@contextmanager
def _no_checkpointing(backbone: nn.Module) -> Iterator[None]:
    """Keys and values leave the layers sideways, which a checkpointed layer would recompute without us."""
    on = [m for m in backbone.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in on:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in on:
            module.gradient_checkpointing = True  # type: ignore[assignment]
