"""A tiny frozen model twice, once plain and once with a MoPs adapter whose parameters are far from their initial values."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from by_hand import Null, Prompts, by_hand, entering
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
    for parameter, size in zip(prompts[:6], (spread, 1 / 8, 0.7, 0, 0, spread), strict=True):
        parameter.copy_(torch.randn(parameter.shape) * size)
    if prompts.shared is not None:
        prompts.shared.copy_(torch.randn(prompts.shared.shape) * spread)
    prompts.gate_scale.fill_(1)
    if model.peft_config[adapter].embedding_size is not None:  # the gate reads what it is handed
        return
    pooled = by_hand(plain, model.peft_config[adapter], prompts, **inputs).pooled
    prompts.gate_mean.copy_(pooled.mean(0) + pooled.std() * torch.randn(pooled.shape[1]) / 4)
    prompts.gate_scale.copy_(pooled.std(0) + pooled.std() / 4)
    if prompts.null is not None:
        open_a_null_expert(prompts.null, (pooled - prompts.gate_mean) / prompts.gate_scale)


def open_a_null_expert(null: Null, features: torch.Tensor) -> None:
    """The first text loses little to the base, the second a third or so, the third everything."""
    null.basis.copy_(torch.randn(null.basis.shape) / 8)
    for centre, row in zip(null.centres, features[[0, 0, 1]], strict=True):
        centre.copy_(null.basis @ row)
    near = [(((null.basis @ row - null.centres) ** 2).sum(-1)).min().clamp(min=1e-12).log() for row in features]
    null.direction.copy_(features[1] / features[1].norm() ** 2)
    null.cut.copy_(torch.stack([near[2] - 1, torch.tensor(4.0), torch.tensor(1.7)]))


def prompts_of(model: PeftModel, adapter: str = "default") -> Prompts:
    layer = model.base_model.layer(adapter)
    names = ("prompts", "gate_in", "gate_out", "gate_mean", "gate_scale", "recovery")
    held = [getattr(layer, f"mops_{name}")[adapter] for name in names]
    return Prompts(*held, dict(layer.mops_shared).get(adapter), null=null_of(layer, adapter))


def null_of(layer: torch.nn.Module, adapter: str = "default") -> Null | None:
    if not layer.configs[adapter].null_expert:
        return None
    return Null(*(getattr(layer, f"mops_null_{name}")[adapter] for name in Null._fields))
