"""A gate that is told its weights: they are used as its own would be, in the rows that are told them alone."""

from __future__ import annotations

import pytest
import torch
from test_mixed import KINDS, pair

from tiny_models import batch

NAN = float("nan")
BESIDE = {kind: "shared" if kind == "hidden states" else "hidden states" for kind in KINDS}


@torch.no_grad()
def logits(model, rows, **told):
    return model(**rows, **told).logits[rows["attention_mask"].bool()]


@pytest.mark.parametrize("kind", KINDS)
def test_told_what_it_would_say_itself_nothing_changes(kind):
    model, rows = pair(kind, BESIDE[kind]), batch()
    model.set_adapter("a")
    own = logits(model, rows)
    weights = model.base_model.last_gate
    torch.testing.assert_close(logits(model, rows, gate_weights=weights), own, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.base_model.last_gate, weights)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_that_are_told_nothing_are_as_they_were_and_others_follow(kind):
    model, rows = pair(kind, BESIDE[kind]), batch()
    model.set_adapter("a")
    own, experts = model(**rows).logits, model.peft_config["a"].num_experts
    gate = model.base_model.last_gate
    first, last = ([float(i == at) for i in range(experts)] for at in (0, experts - 1))
    told = torch.tensor([first, [NAN] * experts, last])
    found = model(**rows, gate_weights=told).logits
    torch.testing.assert_close(found[1][rows["attention_mask"][1].bool()], own[1][rows["attention_mask"][1].bool()])
    torch.testing.assert_close(model.base_model.last_gate, torch.stack([told[0], gate[1], told[2]]))
    turned = model(**rows, gate_weights=told.flip(0)).logits
    assert not torch.allclose(found[0], turned[0], atol=1e-3) or kind in ("separate", "linear")


@torch.no_grad()
def test_rows_of_several_adapters_and_of_none_are_told_each_for_itself():
    model, rows = pair("hidden states", "keys and values"), batch()
    experts = model.peft_config["a"].num_experts
    told = torch.eye(experts)[[0, 1, 0]]
    model.set_adapter("a")
    want = model(**rows, gate_weights=told).logits[0]
    found = model(**rows, gate_weights=told, adapter_names=["a", "__base__", "a"]).logits
    real = rows["attention_mask"][0].bool()
    torch.testing.assert_close(found[0][real], want[real], rtol=1e-4, atol=1e-4)


def test_generate_hands_them_on():
    model, rows = pair("keys and values", "hidden states"), batch()
    model.set_adapter("a")
    told = torch.eye(model.peft_config["a"].num_experts)[[0, 0, 1]]
    model.generate(**rows, gate_weights=told, max_new_tokens=2, do_sample=False)
    torch.testing.assert_close(model.base_model.last_gate, told)
