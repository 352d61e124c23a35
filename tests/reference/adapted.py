"""A tiny frozen model twice, once plain and once with a MoPs adapter whose parameters are far from their initial values."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from by_hand import Prompts, by_hand, entering
from smartmops import MoPsConfig
from tiny_models import batch, build

ADAPTER = dict(num_experts=3, prompts_per_expert=4, injection_layer=2, gate_hidden_size=8)


def adapt(name="llama", kernel="sdpa", changes=None, **options) -> tuple[PreTrainedModel, PeftModel]:
    """The frozen model, and an equal one that carries an adapter with a different gate in every row."""
    plain, base = (build(name, kernel, **(changes or {})) for _ in range(2))
    model = get_peft_model(base, MoPsConfig(**ADAPTER | options))
    scramble(model, plain)
    return plain, model.eval()


@torch.no_grad()
def scramble(model: PeftModel, plain: PreTrainedModel, adapter: str = "default", seed: int = 0) -> None:
    """Prompts of the size of hidden states, a gate neither closed nor uniform that reads standardised inputs."""
    layer, inputs = model.base_model.layer(adapter), batch()
    text = {name: value for name, value in inputs.items() if name != "gate_mask"}
    spread = entering(plain, layer.index, **text).float().std()
    prompts = prompts_of(model, adapter)
    torch.manual_seed(seed)
    for parameter, size in zip(prompts, (spread, 1 / 8, 0.7, 0, 0, spread), strict=True):
        parameter.copy_(torch.randn(parameter.shape) * size)
    prompts.gate_scale.fill_(1)
    if model.peft_config[adapter].embedding_size is not None:  # the gate reads what it is handed
        return
    pooled = by_hand(plain, model.peft_config[adapter], prompts, **inputs).pooled
    prompts.gate_mean.copy_(pooled.mean(0) + pooled.std() * torch.randn(pooled.shape[1]) / 4)
    prompts.gate_scale.copy_(pooled.std(0) + pooled.std() / 4)


def prompts_of(model: PeftModel, adapter: str = "default") -> Prompts:
    layer = model.base_model.layer(adapter)
    names = ("prompts", "gate_in", "gate_out", "gate_mean", "gate_scale", "recovery")
    return Prompts(*(getattr(layer, f"mops_{name}")[adapter] for name in names))
