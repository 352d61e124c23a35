"""Which models can carry the method, said when an adapter is made. Knows transformers' classes; no adapter, no text."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from smartmops.checks.errors import BaseModelError

from . import halves

EMPTY = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # of the environment, as accelerate and TrainingArguments set it
NEEDED = "smartmops adapts decoder-only language models of transformers"


def check(model: Any) -> None:
    """Whether a model is a causal language model of transformers with a plain list of decoder layers.

    Raises:
        BaseModelError: it is none; the message says what it is instead. Or accelerate keeps it empty in all processes
            but the first.
    """
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise BaseModelError(f"{kind} is no model of transformers: {NEEDED}, as AutoModelForCausalLM loads them")
    if getattr(model.config, "is_encoder_decoder", False):
        raise BaseModelError(f"{kind} is an encoder-decoder: {NEEDED}")
    if model.base_model is model or not model.can_generate():
        raise BaseModelError(
            f"{kind} has no head that predicts the next token: {NEEDED}, as AutoModelForCausalLM loads them"
        )
    halves.layers_name(halves.backbone_of(model))
    if os.environ.get(EMPTY, "").lower() in ("1", "true", "yes"):
        raise BaseModelError(
            f"{EMPTY}={os.environ[EMPTY]}: all processes but the first hold an empty base, and every process makes its "
            "adapter from its own: set cpu_ram_efficient_loading of FSDP to false (accelerate launch "
            "--fsdp_cpu_ram_efficient_loading false)"
        )


class _Seen(Exception):
    """Carries what enters the first layer out of a forward pass that ends there."""


@torch.no_grad()
def refuse_changed_embeddings(model: Any, backbone: Any, first: nn.Module, prompts_run: bool) -> None:
    """Hidden states are handed over as `inputs_embeds`: a backbone that changes those on the way in would spoil them.

    Raises:
        BaseModelError: it does; or prompts run through the network, and its positions are ALiBi's, which they have
            none of, or give no numbers below 0, where prompts stand.
    """
    if prompts_run and getattr(model.config, "alibi", False):
        raise BaseModelError(f"{type(model).__name__} uses ALiBi positions, which prompts have none of: choose "
                             "experts='keys_values', or another architecture")  # fmt: skip
    weight = next((p for p in first.parameters() if p.is_floating_point()), None)
    if weight is None or weight.is_meta:
        return

    def stop(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Seen(args[0] if args else kwargs["hidden_states"])

    given = torch.linspace(-1, 1, halves.hidden_size(backbone), device=weight.device, dtype=weight.dtype)[None, None]
    handle = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        halves.upper(backbone, 0)(inputs_embeds=given, use_cache=False)
    except _Seen as seen:
        if not torch.equal(seen.args[0], given):
            raise BaseModelError(f"{type(model).__name__} changes inputs_embeds before its first layer (it scales or "
                                 "norms them): choose another architecture, such as Llama") from None  # fmt: skip
    finally:
        handle.remove()
    if prompts_run:
        at = torch.full((1, 1), -1, device=weight.device)
        seen_by_all = torch.zeros(1, 1, 1, 1, device=weight.device, dtype=weight.dtype)
        out = halves.layer(backbone, 0)(
            inputs_embeds=given, attention_mask=seen_by_all, position_ids=at, use_cache=False
        )
        if not bool(out.last_hidden_state.isfinite().all()):
            raise BaseModelError(f"{type(model).__name__} has no attention at positions below 0, where prompts stand "
                                 "(it scales queries by their position): choose experts='keys_values' and no recovery "
                                 "prompts, or another architecture")  # fmt: skip
