"""What stands in front of a text is made of prompts and weights as they are when the text comes, however they changed."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from adapted import adapt
from smartmops import MoPsConfig
from tiny_models import batch, build


@torch.no_grad()
def logits(model):
    return model(**batch()).logits


def fresh(model):
    """What a copy that has answered nothing gives."""
    return logits(copy.deepcopy(model))


def change_prompts(model):
    model.base_model.layer().mops_prompts["default"].data.mul_(-1)


def change_recovery(model):
    model.base_model.layer().mops_recovery["default"].data.add_(1)


def change_a_weight(model):
    with torch.no_grad():
        model.get_base_model().model.layers[4].mlp.up_proj.weight.mul_(2)


def change_a_weight_past_its_version(model):
    for layer in model.get_base_model().model.layers:
        getattr(layer, "base_layer", layer).mlp.down_proj.weight.data[:, ::2] = 0


def change_a_weight_below(model):
    model.get_base_model().model.layers[0].self_attn.k_proj.weight.data.mul_(2)


def change_dtype(model):
    model.to(torch.float64)


@pytest.mark.parametrize("options", [{}, dict(gate_target="hidden_states")], ids=str)
@pytest.mark.parametrize(
    "change",
    [
        change_prompts,
        change_recovery,
        change_a_weight,
        change_a_weight_past_its_version,
        change_a_weight_below,
        change_dtype,
    ],
)
def test_it_is_made_again_after(change, options):
    _, model = adapt(num_recovery_prompts=2, **options)
    before = logits(model)
    change(model)
    after = logits(model)
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh(model))


def test_it_follows_a_lora_underneath():
    base = get_peft_model(build(), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model = get_peft_model(base, MoPsConfig(num_experts=2, prompts_per_expert=3, injection_layer=2)).eval()
    with_lora = logits(model)
    for module in model.modules():
        if module.__class__.__name__ == "Linear" and hasattr(module, "lora_A"):
            module.enable_adapters(False)
    without = logits(model)
    assert not torch.equal(with_lora, without)
    assert torch.equal(without, fresh(model))


def test_a_copy_keeps_its_own():
    _, model = adapt()
    logits(model)
    other = copy.deepcopy(model)
    change_prompts(other)
    assert not torch.equal(logits(other), logits(model))
