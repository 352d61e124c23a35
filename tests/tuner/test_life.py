"""Adapters come, take turns, go, are copied and pickled; what acts is always what PEFT's life cycle says."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from peft import get_peft_model
from test_packed import gradients, rows
from transformers import AutoModelForCausalLM

from adapted import ADAPTER
from smartmops import MoPsConfig
from tiny_models import batch, build

KINDS = [{}, dict(experts="keys_values"), dict(experts="keys_values", visible_to="answers")]


def adapted(base=None, name="default", **options):
    """Large prompts and a decided gate, the same for the same options."""
    base = base or build()  # which sets a seed of its own
    torch.manual_seed(5)
    model = get_peft_model(base, MoPsConfig(**ADAPTER | options), adapter_name=name)
    loud(model, name)
    return model.eval()


def loud(model, name):
    torch.manual_seed(6)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(f".{name}") and any(
                f"mops_{each}." in key for each in ("prompts", "keys", "values", "gate_out")
            ):
                parameter.normal_(std=2)


@torch.no_grad()
def logits(model):
    return model(**batch()).logits


def bare():
    with torch.no_grad():
        return build()(**{name: value for name, value in batch().items() if name != "gate_mask"}).logits


def stored(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("way", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy, stored],
                         ids=["pickle", "deepcopy", "torch.save"])  # fmt: skip
def test_a_copy_answers_and_comes_apart_like_the_model(way, options):
    model = adapted(**options)
    want = logits(model)
    assert model(**batch()).logits.requires_grad  # the latest pass left a graph, which no copy can hold
    twin = way(model)
    assert torch.equal(logits(twin), want)
    ids = batch()["input_ids"][1:2]
    assert torch.equal(twin.generate(input_ids=ids, max_new_tokens=3), model.generate(input_ids=ids, max_new_tokens=3))
    restored = twin.unload()
    assert type(restored.model.layers[0]) is type(build().model.layers[0])
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("second", [1, 2, 3])
def test_adapting_a_base_twice_leaves_the_last_adapter(second, options):
    base = build()
    adapted(base, injection_layer=2, **options)
    again = adapted(base, injection_layer=second, **options)
    assert torch.equal(logits(again), logits(adapted(injection_layer=second, **options)))


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_deleting_the_active_adapter_leaves_another_and_deleting_all_the_base(options):
    model = adapted(name="a", **options)
    model.add_adapter("b", MoPsConfig(**ADAPTER | options | dict(injection_layer=3)))
    loud(model, "b")
    model.set_adapter("b")
    want = logits(model)
    model.set_adapter("a")
    model.delete_adapter("a")
    assert model.active_adapters == ["b"] and torch.equal(logits(model), want)
    model.delete_adapter("b")
    torch.testing.assert_close(logits(model)[1], bare()[1])
    assert model.base_model.last_gate is None and not model.peft_config
    twin = pickle.loads(pickle.dumps(model))
    for each in (model, twin):
        each.generate(input_ids=batch()["input_ids"][1:2], max_new_tokens=2)
    model.add_adapter("c", MoPsConfig(**ADAPTER | options))
    model.set_adapter("c")
    loud(model, "c")
    assert not torch.equal(logits(model), want) and model.base_model.last_gate is not None
    with pytest.raises(KeyError):
        model.peft_config["b"]


@pytest.mark.parametrize("packed", [False, True])
def test_no_gate_is_told_of_a_pass_that_had_none(packed):
    model, (padded, ends) = adapted(task_type="CAUSAL_LM"), rows()
    given = dict(packed=ends) if packed else padded
    model(**given)
    assert model.base_model.last_gate is not None
    with model.disable_adapter():
        assert model.base_model.last_gate is None
        model(**given)
        assert model.base_model.last_gate is None
    assert model.base_model.last_gate is None


@pytest.mark.parametrize("when", ["before", "after", "taken off"])
@pytest.mark.parametrize("options", [*KINDS, dict(gate_target="hidden_states")], ids=str)
def test_hooks_of_accelerate_change_nothing(options, when):
    base = build()
    for layer in base.model.layers if when != "after" else ():
        add_hook_to_module(layer, AlignDevicesHook("cpu"))
    model = adapted(base, **options)
    layers = [getattr(layer, "base_layer", layer) for layer in model.base_model.model.model.layers]
    for layer in layers if when != "before" else ():
        (add_hook_to_module(layer, AlignDevicesHook("cpu")) if when == "after" else remove_hook_from_module(layer))
    assert torch.equal(logits(model), logits(adapted(**options)))
    model.unload()
    torch.testing.assert_close(logits_of(base), bare())


def logits_of(base):
    with torch.no_grad():
        return base(**{name: value for name, value in batch().items() if name != "gate_mask"}).logits


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_layers_that_wait_on_disk(tmp_path, options):
    build().save_pretrained(tmp_path)
    places = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb")}
    places |= {f"model.layers.{layer}": "cpu" if layer < 2 else "disk" for layer in range(6)}
    base = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "off")
    torch.testing.assert_close(logits(adapted(base, **options)), logits(adapted(**options)))


def test_replicas_of_data_parallel_are_sent_to_torchrun():
    replica = adapted().get_base_model()._replicate_for_data_parallel()
    with pytest.raises(ValueError, match="torchrun"):
        replica(input_ids=batch()["input_ids"])


@pytest.mark.parametrize("saved", ["lm_head", "norm", "layers.4.mlp.down_proj"])
def test_saved_modules_have_the_same_gradient_packed(saved):
    if saved == "norm":
        saved = "model.norm"
    model = adapted(modules_to_save=[saved], task_type="CAUSAL_LM")
    padded, packed = rows()
    want_loss, want = gradients(model, **padded, use_cache=False)
    got_loss, got = gradients(model, packed=packed)
    assert got_loss == pytest.approx(want_loss, rel=1e-5) and got.keys() == want.keys()
    assert any("modules_to_save" in name for name in want)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize(
    ("saved", "options"),
    [("embed_tokens", {}), ("layers.1.mlp", {}), ("mlp", {}),
     ("layers.4.mlp", dict(experts="keys_values", visible_to="answers")), ("layers.3.mlp", dict(gate_layer=5))],
)  # fmt: skip
def test_saved_modules_that_nothing_would_train_are_refused(saved, options):
    with pytest.raises(ValueError, match="stands where this method trains nothing"):
        adapted(modules_to_save=[saved], **options)
