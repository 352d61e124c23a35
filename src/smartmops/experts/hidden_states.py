"""Expert and recovery prompts in, their keys and values in every layer out. No text, no gate but a given scale."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from smartmops.attention.passage import KeyValue, Record
from smartmops.backbone.halves import layers_name, upper


def positions(experts: int, per_expert: int, isolated: bool) -> Int[Tensor, prompts]:
    """Positions just before the text, which starts at 0: -P..-1 for every isolated expert, -K..-1 for causal ones."""
    if isolated:
        return torch.arange(-per_expert, 0).repeat(experts)
    return torch.arange(-experts * per_expert, 0)


def visible(experts: int, per_expert: int, isolated: bool) -> Bool[Tensor, "prompts prompts"]:
    """Which prompt (column) a prompt (row) attends to: earlier ones, of its own expert where isolated."""
    total = experts * per_expert
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    expert = torch.arange(total) // per_expert
    return causal & (expert[:, None] == expert[None, :]) if isolated else causal


def prefix(
    backbone: nn.Module,
    first: int,
    prompts: Float[Tensor, "prompts hidden"],
    experts: int,
    isolated: bool,
    scale: Float[Tensor, "rows prompts"] | None = None,
) -> dict[int, KeyValue]:
    """Run the prompt columns alone through layers `first`.. and collect their keys and values.

    They never see the text, so one row serves every batch (M' of the paper); only under a `scale` per row (Algorithm 1:
    columns times g before every layer) is there a row for each input.
    """
    apart = isolated and scale is None  # then every expert is a row of its own, and nobody computes what is masked
    own, device = len(prompts) // experts, prompts.device
    dtype = next(p.dtype for p in backbone.parameters() if p.is_floating_point())
    rows = experts if apart else 1 if scale is None else len(scale)
    record = Record(None if scale is None else scale.to(dtype).unsqueeze(-1))
    columns = prompts.view(experts, own, -1) if apart else prompts.expand(rows, -1, -1)
    see = visible(1 if apart else experts, columns.shape[1] // (1 if apart else experts), isolated).to(device)
    mask = torch.zeros(see.shape, dtype=dtype, device=device).masked_fill(~see, torch.finfo(dtype).min)
    at = (positions(1, own, True) if apart else positions(experts, own, isolated)).to(device)
    with _no_checkpointing(backbone):
        # A context of its own: transformers collects the text's `output_hidden_states` through a context variable.
        contextvars.Context().run(
            upper(backbone, first),
            inputs_embeds=columns.to(dtype),
            attention_mask=mask[None, None].expand(rows, 1, -1, -1),
            position_ids=at[None].expand(rows, -1),
            use_cache=False,
            mops=record,
        )
    _gather_again(backbone, record.kv)
    if not apart:
        return record.kv
    return {layer: (_in_a_row(key), _in_a_row(value)) for layer, (key, value) in record.kv.items()}


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


def _in_a_row(
    columns: Float[Tensor, "experts kv_heads per_expert head"],
) -> Float[Tensor, "1 kv_heads prompts head"]:
    """The experts' columns one expert after another."""
    return columns.transpose(0, 1).flatten(1, 2)[None]


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
