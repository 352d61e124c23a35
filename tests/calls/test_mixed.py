"""Rows of one batch served by several adapters, each as if its adapter were the only one."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from adapted import ADAPTER
from smartmops import MoPsConfig
from tiny_models import batch, build

KINDS = {
    "hidden states": {},
    "scaled": dict(gate_target="hidden_states", injection_layer=3),
    "recovery": dict(num_recovery_prompts=2, num_experts=2, injection_layer=4),
    "reads ahead": dict(gate_layer=4),
    "keys and values": dict(experts="keys_values"),
    "shared": dict(experts="keys_values", injection_layer=3, shared_prompts=2, num_experts=5),
    "separate": dict(experts="keys_values", prefix_attention="separate"),
    "linear": dict(experts="keys_values", prefix_attention="linear", injection_layer=1),
    "answers": dict(experts="keys_values", visible_to="answers", answer_header=[7]),
}
PAIRS = [("hidden states", kind) for kind in KINDS if kind != "hidden states"] + [("answers", "separate"),
         ("separate", "linear"), ("keys and values", "shared")]  # fmt: skip


def pair(*kinds: str):
    """A model with adapters "a" and "b" of these kinds, whose parameters are far from their initial values."""
    model = get_peft_model(build(), MoPsConfig(**ADAPTER | KINDS[kinds[0]]), adapter_name="a")
    model.add_adapter("b", MoPsConfig(**ADAPTER | KINDS[kinds[1]]))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mops_" in name and not any(each in name for each in ("size", "mean", "scale", "null")):
                parameter.add_(torch.randn_like(parameter) * (3 if "gate_out" in name else 1))
    return model.eval()


@torch.no_grad()
def alone(model, name, rows):
    """Logits of the whole batch under one adapter."""
    if name == "__base__":
        with model.disable_adapter():
            return model(**{key: value for key, value in rows.items() if key != "gate_mask"}).logits
    model.set_adapter(name)
    return model(**rows).logits


@pytest.mark.parametrize("kinds", PAIRS, ids=str)
def test_each_row_is_as_under_its_adapter_alone(kinds):
    model, rows = pair(*kinds), batch()
    rows["position_ids"] = (rows["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    for names in (["a", "b", "a"], ["b", "__base__", "a"], ["b", "b", "b"], ["__base__"] * 3):
        want = torch.stack([alone(model, name, rows)[row] for row, name in enumerate(names)])
        model.set_adapter("a")
        with torch.no_grad():
            got = model(**rows, adapter_names=names).logits
        real = rows["attention_mask"].bool()
        torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-4)
        if "__base__" in names:
            row = names.index("__base__")
            assert torch.equal(got[row][real[row]], want[row][real[row]])


@pytest.mark.parametrize("kinds", [("hidden states", "recovery"), ("answers", "separate")], ids=str)
@pytest.mark.parametrize("way", [{}, dict(num_beams=2), dict(use_cache=False), dict(num_beams=2, num_return_sequences=2)],
                         ids=str)  # fmt: skip
def test_generation(kinds, way):
    model, ids = pair(*kinds), batch()["input_ids"].clamp(min=3)
    mask, names, want = torch.ones_like(ids), ["b", "__base__", "a"], []
    mask[0, :4] = 0
    each = way.get("num_return_sequences", 1)
    given = dict(input_ids=ids, attention_mask=mask, max_new_tokens=4, eos_token_id=None, **way)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                want.append(model.generate(**given)[row * each : (row + 1) * each])
        else:
            model.set_adapter(name)
            want.append(model.generate(**given)[row * each : (row + 1) * each])
    assert torch.equal(model.generate(**given, adapter_names=names), torch.cat(want))


def test_the_gate_of_each_row_is_that_of_its_adapter():
    model, rows = pair("hidden states", "recovery"), batch()
    gates = {}
    for name in ("a", "b"):
        alone(model, name, rows)
        gates[name] = model.base_model.last_gate
    with torch.no_grad():
        model(**rows, adapter_names=["b", "__base__", "a"])
    got = model.base_model.last_gate
    torch.testing.assert_close(got[0, :2], gates["b"][0])
    torch.testing.assert_close(got[2], gates["a"][2])
    assert not got[1].any() and not got[0, 2:].any()


def test_saved_heads_follow_the_names():
    model = get_peft_model(build(), MoPsConfig(**ADAPTER, modules_to_save=["lm_head"]), adapter_name="a")
    model.add_adapter("b", MoPsConfig(**ADAPTER, modules_to_save=["lm_head"]))
    model.eval()
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["b"].weight.mul_(2)
    rows = batch()
    want = torch.stack([alone(model, name, rows)[row] for row, name in enumerate(["b", "a", "b"])])
    with torch.no_grad():
        torch.testing.assert_close(model(**rows, adapter_names=["b", "a", "b"]).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [[2, 2, 2], [0, 1, 2]], ids=["the same question", "padded rows"])
def test_saved_heads_follow_the_names_where_a_prompt_is_read_once(rows):
    answers = dict(experts="keys_values", visible_to="answers", answer_header=[7, 11], modules_to_save=["lm_head"])
    model = get_peft_model(build(), MoPsConfig(**ADAPTER | answers), adapter_name="a")
    model.add_adapter("b", MoPsConfig(**ADAPTER | answers))
    model.eval()
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["b"].weight.mul_(2)
    ids = torch.randint(12, 300, (3, 20), generator=torch.Generator().manual_seed(3))
    ids[:, -2:] = torch.tensor([7, 11])
    mask = (torch.arange(20) >= torch.tensor([12, 9, 0])[:, None]).long()
    inputs = {"input_ids": (ids * mask)[rows], "attention_mask": mask[rows]}
    how = dict(max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True, output_logits=True)
    got = model.generate(**inputs, adapter_names=["b", "a", "b"], **how).logits[0]
    for row, name in enumerate(["b", "a", "b"]):
        model.set_adapter(name)
        want = model.generate(**{key: value[row : row + 1] for key, value in inputs.items()}, **how).logits[0]
        torch.testing.assert_close(got[row : row + 1], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b"], "2 names for a batch of 3 rows"),
        (["a", "c", "b"], r"\['c'\], but the adapters are \['a', 'b'\]"),
        ([], "adapter_names is empty"),
    ],
)
def test_names_that_do_not_fit(names, message):
    with pytest.raises(ValueError, match=message):
        pair("hidden states", "recovery")(**batch(), adapter_names=names)


def test_what_names_cannot_serve():
    model = pair("hidden states", "recovery")
    packed = {"input_ids": torch.arange(3, 9), "labels": torch.arange(3, 9), "lengths": torch.tensor([6])}
    with pytest.raises(ValueError, match="packed"):
        model(packed=packed, adapter_names=["a"])
    with pytest.raises(ValueError, match="training mode"):
        model.train()(**batch(), adapter_names=["a", "b", "a"])
    with pytest.raises(ValueError, match="alora_offsets"):
        model(**batch(), alora_offsets=[1, 1, 1])


@torch.no_grad()
def test_a_cache_goes_on_under_the_adapter_that_filled_it():
    model, ids = pair("hidden states", "recovery"), batch()["input_ids"].clamp(min=3)
    model.set_adapter("a")
    cache = model(input_ids=ids, use_cache=True).past_key_values
    model.set_adapter("b")
    with pytest.raises(ValueError, match=r"filled by adapter a, and now b"):
        model(input_ids=ids[:, :1], past_key_values=cache)
    model(input_ids=ids[:, :1], past_key_values=cache, adapter_names=["a", "a", "a"])
    names = ["a", "b", "__base__"]
    cache = model(input_ids=ids, use_cache=True, adapter_names=names).past_key_values
    cache.crop(-1)
    with pytest.raises(ValueError, match=r"input_ids come where past_key_values were cropped"):
        model(input_ids=ids[:, :1], past_key_values=cache, adapter_names=names)
    model(input_ids=ids[:, -1:], past_key_values=cache, adapter_names=names)
