"""Read this first: prompts that nobody attends to change nothing, whatever they contain."""

from __future__ import annotations

import pytest
import torch

from adapted import adapt
from tiny_models import KERNELS, batch, relative


@pytest.mark.parametrize(("name", "kernel"), KERNELS)
def test_with_every_prompt_masked_out_the_model_is_the_frozen_one(masked_out, name, kernel):
    frozen, model = adapt(name, kernel, num_recovery_prompts=2)
    inputs = batch()
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        want = frozen(input_ids=inputs["input_ids"], attention_mask=mask, position_ids=positions).logits
        assert relative(model(**inputs).logits, want, mask) < 1e-5


@pytest.mark.parametrize("target", ["attention", "hidden_states"])
def test_the_adapter_acts_until_it_is_disabled(target):
    frozen, model = adapt(num_recovery_prompts=2, gate_target=target)
    inputs = batch()
    plain = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    with torch.no_grad():
        want = frozen(**plain).logits
        assert relative(model(**inputs).logits, want, plain["attention_mask"]) > 0.1
        with model.disable_adapter():
            assert torch.equal(model(**plain).logits, want)
            model(**inputs)  # the gate's own keywords are harmless while it is off
        assert relative(model(**inputs).logits, want, plain["attention_mask"]) > 0.1
