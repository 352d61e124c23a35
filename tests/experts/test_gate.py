"""The gate's mathematics, and what it must never see: responses, neighbours, the order of experts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from adapted import adapt, prompts_of
from by_hand import by_hand, gate_weights
from smartmops import MoPsConfig
from tiny_models import VOCABULARY, WIDTH, batch, relative

SEEDS = st.integers(0, 2**31 - 1)
few = settings(max_examples=25, deadline=None)


@pytest.fixture(scope="module")
def gated():
    """A wrapper, its adapter's config, and its parameters."""
    _, model = adapt(num_experts=5, prompts_per_expert=2)
    return model.base_model.layer(), model.peft_config["default"], prompts_of(model)


def inputs(seed: int, size: float):
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed)) * size


@given(seed=SEEDS, size=st.floats(0.01, 100), temperature=st.floats(0.05, 20), top_k=st.sampled_from([None, 1, 2, 5]))
@few
def test_weights_sum_to_one_and_are_the_formula(gated, seed, size, temperature, top_k):
    layer, config, prompts = gated
    config.gate_temperature, config.gate_top_k = temperature, top_k
    pooled = inputs(seed, size)
    with torch.no_grad():
        got = layer.gate(pooled, "default")
        assert_close(got, gate_weights(config, prompts, pooled), rtol=1e-4, atol=1e-5)
    assert_close(got.sum(-1), torch.ones(4))
    assert (got >= 0).all()
    if top_k is not None:
        assert ((got > 0).sum(-1) <= top_k).all()


@given(seed=SEEDS, cold=st.floats(0.2, 1), warm=st.floats(1.1, 10))
@few
def test_a_higher_temperature_is_a_flatter_gate_of_the_same_order(gated, seed, cold, warm):
    layer, config, _ = gated
    config.gate_top_k, pooled = None, inputs(seed, 1)
    gates = []
    for config.gate_temperature in (cold, warm):
        gates.append(layer.gate(pooled, "default").detach())
    sharp, flat = (-(gate * gate.clamp(min=1e-30).log()).sum(-1) for gate in gates)
    assert (flat > sharp).all()
    assert torch.equal(gates[0].argmax(-1), gates[1].argmax(-1))


@given(seed=SEEDS, factor=st.floats(0.1, 10))
@few
def test_the_standardisation_is_undone_by_shifting_and_scaling_the_input(gated, seed, factor):
    layer, config, prompts = gated
    config.gate_temperature, config.gate_top_k = 1.0, None
    pooled = inputs(seed, 1)
    with torch.no_grad():
        want = layer.gate(pooled, "default")
        saved = prompts.gate_mean.clone(), prompts.gate_scale.clone()
        prompts.gate_mean.copy_(saved[0] * factor + 3)
        prompts.gate_scale.copy_(saved[1] * factor)
        got = layer.gate(pooled * factor + 3, "default")
        prompts.gate_mean.copy_(saved[0])
        prompts.gate_scale.copy_(saved[1])
    assert_close(got, want, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def pair():
    return adapt(num_recovery_prompts=2)


def training_rows(seed: int) -> dict:
    rows = batch(seed)
    read = rows.pop("gate_mask").bool()
    rows["labels"] = rows["input_ids"].masked_fill(read | (rows["attention_mask"] == 0), -100)
    return rows


@given(seed=st.integers(0, 1000))
@few
def test_changing_the_response_never_changes_the_gate(pair, seed):
    _, model = pair
    rows = training_rows(seed)
    other = dict(rows)
    response = rows["labels"] != -100
    changed = torch.where(response, (rows["input_ids"] + 7 - 3) % (VOCABULARY - 3) + 3, rows["input_ids"])
    other |= {"input_ids": changed, "labels": changed.masked_fill(~response, -100)}
    with torch.no_grad():
        model(**rows)
        gate = model.base_model.last_gate
        model(**other)
        assert_close(model.base_model.last_gate, gate, rtol=0, atol=1e-6)
        instruction = torch.where(rows["labels"] == -100, changed.flip(1).clamp(min=3), changed)
        model(**other | {"input_ids": instruction})
        assert relative(model.base_model.last_gate, gate) > 1e-3


@given(order=st.permutations(range(3)), target=st.sampled_from(["attention", "hidden_states"]))
@few
def test_permuting_isolated_experts_permutes_the_gate_and_nothing_else(pair, order, target):
    _, model = pair
    rows, prompts, order = batch(), prompts_of(model), list(order)
    model.peft_config["default"].gate_target = target
    with torch.no_grad():
        want, gate = model(**rows).logits, model.base_model.last_gate
        saved = prompts.experts.clone(), prompts.gate_out.clone()
        prompts.experts.copy_(saved[0].view(3, 4, WIDTH)[order].view(12, WIDTH))
        prompts.gate_out.copy_(saved[1][order])
        got, permuted = model(**rows).logits, model.base_model.last_gate
        prompts.experts.copy_(saved[0])
        prompts.gate_out.copy_(saved[1])
        model.peft_config["default"].gate_target = "attention"
    assert_close(permuted, gate[:, order])
    assert relative(got, want, rows["attention_mask"]) < 1e-5


def test_the_order_of_causal_experts_matters():
    """So the test above could fail."""
    _, model = adapt(expert_attention="causal")
    rows, prompts = batch(), prompts_of(model)
    with torch.no_grad():
        want = model(**rows).logits
        prompts.experts.copy_(prompts.experts.view(3, 4, WIDTH).flip(0).view(12, WIDTH))
        prompts.gate_out.copy_(prompts.gate_out.flip(0))
        assert relative(model(**rows).logits, want, rows["attention_mask"]) > 1e-3


@pytest.mark.parametrize("target", ["attention", "hidden_states"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_rows_of_a_batch_are_the_rows_alone(name, target):
    _, model = adapt(name, "eager", gate_target=target, num_recovery_prompts=2)
    rows = batch()
    with torch.no_grad():
        whole, gate = model(**rows).logits, model.base_model.last_gate
        assert (gate.std(0) > 0.005).any()
        for index in range(3):
            keep = rows["attention_mask"][index].bool()
            alone = model(**{key: value[index : index + 1][:, keep] for key, value in rows.items()}).logits
            assert relative(whole[index : index + 1][:, keep], alone) < 1e-5
            assert relative(model.base_model.last_gate, gate[index : index + 1]) < 1e-5


def test_an_expert_with_a_closed_gate_is_gone():
    _, model = adapt(num_experts=5, gate_top_k=1)
    rows, prompts = batch(), prompts_of(model)
    with torch.no_grad():
        want, gate = model(**rows).logits, model.base_model.last_gate
        closed = gate.sum(0) == 0
        assert closed.any() and ((gate == 0) | (gate == 1)).all()
        prompts.experts.view(5, 4, WIDTH)[closed] = 100.0
        assert relative(model(**rows).logits, want, rows["attention_mask"]) < 1e-5


def test_the_sequence_gate_reads_the_response_too_and_warns():
    with pytest.warns(UserWarning, match="sequence"):
        MoPsConfig(gate_input="sequence")
    _, model = adapt(gate_input="sequence")
    rows = training_rows(1)
    longer = dict(rows, input_ids=torch.where(rows["labels"] == -100, rows["input_ids"], 5))
    with torch.no_grad():
        model(**rows)
        gate = model.base_model.last_gate
        model(**longer)
    assert relative(model.base_model.last_gate, gate) > 1e-3


def test_an_external_embedding_replaces_what_the_gate_reads():
    plain, model = adapt(embedding_size=16, embedder="any encoder")
    rows = {key: value for key, value in batch().items() if key != "gate_mask"}
    embedding = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    config, prompts = model.peft_config["default"], prompts_of(model)
    with torch.no_grad():
        want = gate_weights(config, prompts, embedding)
        got = model(**rows, gate_embedding=embedding).logits
        assert_close(model.base_model.last_gate, want)
        by = by_hand(plain, config, prompts, **rows, gate_mask=rows["attention_mask"], gate=want)
        assert relative(got, by.logits, rows["attention_mask"]) < 1e-5
        model.generate(**rows, gate_embedding=embedding, num_beams=2, max_new_tokens=2)
        assert_close(model.base_model.last_gate[::2], want)
    with pytest.raises(ValueError, match="gate_embedding"):
        model(**rows)
    with pytest.raises(ValueError, match=r"width 8.*embedding_size=16"):
        model(**rows, gate_embedding=embedding[:, :8])
