"""Magnitude pruning: the share asked for, the smallest weights, and nothing outside the decoder's linear layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from smartmops.compression.magnitude import prune_magnitude


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    )


@given(st.floats(0.05, 0.95))
def test_each_layer_loses_its_smallest_weights_and_no_others(sparsity: float) -> None:
    before, model = tiny(), tiny()
    assert prune_magnitude(model, sparsity) == pytest.approx(sparsity, abs=0.01)
    for (name, old), new in zip(before.named_modules(), model.modules(), strict=True):
        if not isinstance(old, nn.Linear) or "layers" not in name:
            continue
        gone = new.weight == 0
        assert int(gone.sum()) == round(sparsity * old.weight.numel())
        assert old.weight[gone].abs().max() <= old.weight[~gone].abs().min()
        assert torch.equal(new.weight[~gone], old.weight[~gone])


def test_embeddings_head_and_norms_are_left_alone() -> None:
    before, model = tiny(), tiny()
    prune_magnitude(model, 0.9)
    for (name, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        if "layers" not in name or "norm" in name:
            assert torch.equal(old, new), name


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 7.0])
def test_a_share_that_is_none_is_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match=f"sparsity={sparsity}: choose a share of zeros between 0 and 1"):
        prune_magnitude(tiny(), sparsity)
