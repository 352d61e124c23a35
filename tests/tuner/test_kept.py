"""In inference the prefix is made once, and made again whenever anything it was made from changes."""

from __future__ import annotations

import copy

import pytest
import torch
from adapted import adapt
from peft import LoraConfig, get_peft_model
from tiny_models import batch, build

from smartmops import MoPsConfig
from smartmops.tuner import experts


@pytest.fixture
def made(monkeypatch):
    """How often a prefix was computed."""
    calls = []
    plain = experts.prefix

    def counted(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr(experts, "prefix", counted)
    return calls


@torch.no_grad()
def logits(model):
    return model(**batch()).logits


def fresh(model):
    """What a model that keeps nothing gives."""
    model.base_model.model.mops_engine.kept.found.clear()
    return logits(model)


def test_it_is_made_once_with_its_recovery_prompts(made):
    _, model = adapt(num_recovery_prompts=2)
    first = logits(model)
    assert len(made) == 2
    assert torch.equal(logits(model), first) and len(made) == 2
    assert torch.equal(fresh(model), first) and len(made) == 4


def test_training_makes_it_anew_every_time(made):
    _, model = adapt()
    for _ in range(2):
        model(**batch())
    assert len(made) == 2
    with torch.no_grad():
        model.train()
        model(**batch())
        model(**batch())
    assert len(made) == 4


def change_prompts(model):
    model.base_model.layer().mops_prompts["default"].data.mul_(-1)


def change_recovery(model):
    model.base_model.layer().mops_recovery["default"].data.add_(1)


def change_a_weight(model):
    with torch.no_grad():
        model.get_base_model().model.layers[4].mlp.up_proj.weight.mul_(2)


def change_dtype(model):
    model.to(torch.float64)


@pytest.mark.parametrize("change", [change_prompts, change_recovery, change_a_weight, change_dtype])
def test_it_is_made_again_after(change):
    _, model = adapt(num_recovery_prompts=2)
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
