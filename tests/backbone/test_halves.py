"""Two views of one backbone that share every weight: the upper one over the lower one is the whole, bit for bit."""

from __future__ import annotations

import pytest
import torch

from smartmops.backbone.halves import lower, upper
from tiny_models import KERNELS, LAYERS, WIDTH, batch, build


def text() -> dict:
    rows = batch()
    positions = (rows["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"], "position_ids": positions}


@pytest.mark.parametrize(("name", "kernel"), KERNELS)
def test_upper_over_lower_is_the_whole(name, kernel):
    changes = dict(sliding_window=4) if name in ("mistral", "gemma2", "gemma3_text") else {}
    backbone, rows = build(name, kernel, **changes).base_model, text()
    without_tokens = {key: value for key, value in rows.items() if key != "input_ids"}
    with torch.no_grad():
        want = backbone(**rows, use_cache=False).last_hidden_state
        for n in range(LAYERS):
            hidden = lower(backbone, n)(**rows, use_cache=False).last_hidden_state
            got = upper(backbone, n)(inputs_embeds=hidden, **without_tokens, use_cache=False).last_hidden_state
            assert torch.equal(got, want), n
            assert n == 0 or not torch.allclose(hidden, want, atol=1e-2)
        assert torch.equal(backbone(**rows, use_cache=False).last_hidden_state, want)  # the views changed nothing


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_halves_hold_no_weights_of_their_own(name):
    backbone = build(name).base_model
    count, mine = backbone.config.num_hidden_layers, {id(p) for p in backbone.parameters()}
    halves = [lower(backbone, 2), upper(backbone, 2)]
    assert all(id(p) in mine for half in halves for p in half.parameters())
    assert [half.config.num_hidden_layers for half in halves] == [2, count - 2]
    assert backbone.config.num_hidden_layers == count == LAYERS


def test_gradients_reach_the_hidden_states_between_the_halves():
    backbone, rows = build().base_model, text()
    hidden = torch.randn(3, 11, WIDTH, requires_grad=True)
    inputs = {"inputs_embeds": hidden, "attention_mask": rows["attention_mask"], "use_cache": False}
    upper(backbone, 3)(**inputs).last_hidden_state.sum().backward()
    assert hidden.grad.abs().max() > 0
