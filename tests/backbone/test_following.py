"""Rows of a cache that are reordered, repeated or left out go on with what the gate has read of them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from transformers import DynamicCache, StaticCache

from smartmops import MoPsConfig
from smartmops.attention.context import ForwardContext
from tiny_models import VOCABULARY, build, relative

IDS = torch.randint(10, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(5))
REAL = torch.arange(9) >= torch.tensor([0, 3, 2])[:, None]
KINDS = {
    "answers": dict(experts="keys_values", visible_to="answers", answer_header=[7, 8]),
    "beside": dict(experts="keys_values", prefix_attention="separate"),
    "attention": dict(num_recovery_prompts=2),
    "hidden states": dict(gate_target="hidden_states", num_recovery_prompts=2),
    "null expert": dict(null_expert=True, null_threshold=0.5),
}
CHANGES = {
    "reorder_cache": ("reorder_cache", torch.tensor([2, 0, 1])),
    "with a row twice": ("reorder_cache", torch.tensor([1, 1, 0])),
    "batch_select_indices": ("batch_select_indices", torch.tensor([2, 0])),
    "truth values": ("batch_select_indices", torch.tensor([True, False, True])),
    "a list": ("batch_select_indices", [1]),
    "batch_repeat_interleave": ("batch_repeat_interleave", 2),
}


def adapt(**options):
    torch.manual_seed(0)
    model = get_peft_model(build(), MoPsConfig(**dict(num_experts=3, prompts_per_expert=2, injection_layer=2,
                                                      gate_hidden_size=8, task_type="CAUSAL_LM") | options))  # fmt: skip
    for name in ("mops_gate_out", "mops_prompts", "mops_values", "mops_head_weight"):
        if "default" in (held := getattr(model.base_model.layer(), name)):
            torch.nn.init.normal_(held["default"], std=3)
    return model.eval()


def filled(model, cache=None, **given):
    ids = IDS.clone()
    ids[:, -4:-2] = torch.tensor([7, 8])
    ids[1, -3:] = torch.tensor([7, 8, 20])
    found = DynamicCache(config=model.config) if cache is None else cache
    model(input_ids=ids, attention_mask=REAL.long(), past_key_values=found, **given)
    return found


def after(model, cache, rows: torch.Tensor, **given) -> torch.Tensor:
    """Logits of two more tokens of these rows."""
    found, real = [], REAL[rows].long()
    for token in (torch.tensor([30, 31, 32]), torch.tensor([40, 41, 42])):
        real = torch.nn.functional.pad(real, (0, 1), value=1)
        out = model(input_ids=token[rows][:, None], attention_mask=real, past_key_values=cache, **given)
        found.append(out.logits)
    return torch.cat(found, 1)


def rows_after(name: str, of) -> torch.Tensor:
    at = torch.arange(3)
    return at.repeat_interleave(of) if name == "batch_repeat_interleave" else at[of]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_each_row_keeps_its_experts(options, change):
    model, (name, of) = adapt(**options), change
    want = after(model, filled(model), torch.arange(3))
    assert relative(want[:1], after(model, filled(model), torch.tensor([0, 0, 0]))[1:2]) > 1e-3, "rows are alike"
    cache, rows = filled(model), rows_after(name, of)
    getattr(cache, name)(of)
    assert relative(after(model, cache, rows), want[rows]) < 1e-5
    assert len(model.base_model.last_gate) == len(rows)


@torch.no_grad()
def test_a_copy_and_a_stored_cache_follow_their_own_rows():
    model = adapt()
    want, rows = after(model, filled(model), torch.arange(3)), torch.tensor([2, 0, 1])
    for again in (copy.deepcopy, copy.copy, lambda cache: pickle.loads(pickle.dumps(cache))):
        cache = filled(model)
        other = again(cache)
        other.layers = copy.deepcopy(other.layers)  # which a shallow copy shares
        other.reorder_cache(rows)
        assert isinstance(other, DynamicCache) and type(other).__name__ == "DynamicCache"
        assert relative(after(model, other, rows), want[rows]) < 1e-5
        assert relative(after(model, cache, torch.arange(3)), want) < 1e-5


@torch.no_grad()
def test_a_static_cache_and_rows_of_several_adapters_follow_too():
    model, rows = adapt(), torch.tensor([2, 0, 1])
    want = after(model, filled(model), torch.arange(3))
    cache = filled(model, StaticCache(model.config, 16))
    cache.reorder_cache(rows)
    assert relative(after(model, cache, rows), want[rows]) < 1e-5
    torch.manual_seed(1)
    model.add_adapter("other", MoPsConfig(num_experts=2, prompts_per_expert=3, injection_layer=3,
                                          experts="keys_values", task_type="CAUSAL_LM"))  # fmt: skip
    names = ["other", "default", "__base__"]
    want = after(model, filled(model, adapter_names=names), torch.arange(3), adapter_names=names)
    cache = filled(model, adapter_names=names)
    cache.reorder_cache(rows)
    got = after(model, cache, rows, adapter_names=[names[row] for row in rows])
    assert relative(got, want[rows]) < 1e-5


def test_nothing_is_made_anew_for_beams_of_one_text():
    context = ForwardContext(gate=torch.tensor([[0.2, 0.8], [0.2, 0.8], [1.0, 0.0]]))
    assert context.of_rows(lambda each: each[[1, 0, 2]]) is context
    assert context.of_rows(lambda each: each[[2, 0, 1]]) is not context
