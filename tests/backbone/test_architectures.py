"""A sample of the architectures in docs/architectures.md, by the checks that made the page; and what some of them need."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from smartmops import MoPsConfig
from smartmops.experts import keys_values

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("architectures", ROOT / "scripts" / "architectures.py")
assert spec is not None and spec.loader is not None
architectures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(architectures)

WORKS = ["opt", "gpt_bigcode", "deepseek_v3", "afmoe"]
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=100)
POSITIONED = {
    "gpt2": SMALL, "gpt_bigcode": SMALL, "opt": SMALL | dict(word_embed_proj_dim=32, ffn_dim=48),
    "opt, projected": SMALL | dict(word_embed_proj_dim=16, ffn_dim=48),
}  # fmt: skip


@pytest.mark.parametrize("name", WORKS)
def test_it_works_with_both_kinds_of_experts(name):
    assert architectures.examine(name) == {"hidden_states": "works", "keys_values": "works"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["deepseek_v2", "biogpt", "granite", "cohere", "gemma3_text", "falcon", "lfm2", "bert"]
)
def test_the_page_says_what_is(name):
    found = json.loads((ROOT / "docs" / "architectures.json").read_text())["architectures"][name]
    assert architectures.examine(name) == found


def test_the_page_is_written_from_the_results():
    results = json.loads((ROOT / "docs" / "architectures.json").read_text())
    page = architectures.page(results["architectures"], results["transformers"])
    assert (ROOT / "docs" / "architectures.md").read_text() == page
    assert not [name for name, each in results["architectures"].items() if "fails" in str(each.values())]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("experts", ["hidden_states", "keys_values"])
@pytest.mark.parametrize("name", POSITIONED)
def test_positions_that_are_added_keep_half_precision(name, experts, dtype):
    config = AutoConfig.for_model(name.partition(",")[0], **POSITIONED[name])
    base = AutoModelForCausalLM.from_config(config, dtype=dtype)  # in training mode, as it is born
    model = get_peft_model(base, MoPsConfig(num_experts=2, prompts_per_expert=2, injection_layer=1, experts=experts))
    ids = torch.arange(3, 11)[None]
    loss = model(input_ids=ids, labels=ids.masked_fill(ids < 6, -100)).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert model.eval()(input_ids=ids).logits.dtype == dtype


@pytest.mark.parametrize("name", POSITIONED)
def test_packed_rows_are_padded_rows_in_training_mode_too(name):
    config = AutoConfig.for_model(name.partition(",")[0], **POSITIONED[name])
    still = dict.fromkeys(("attn_pdrop", "resid_pdrop", "dropout", "attention_dropout"), 0.0)
    for part, value in still.items():
        if hasattr(config, part):
            setattr(config, part, value)
    adapter = MoPsConfig(num_experts=2, prompts_per_expert=2, injection_layer=0, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_config(config).eval(), adapter)
    ids = torch.randint(3, 100, (2, 8))
    labels = ids.masked_fill(torch.arange(8) < 4, -100)
    with torch.no_grad():
        padded = model(input_ids=ids, labels=labels).loss
        batch = {"input_ids": ids.flatten(), "labels": labels.flatten(), "lengths": torch.tensor([8, 8])}
        assert torch.allclose(model(packed=batch).loss, padded, atol=1e-5)


def test_where_there_is_nothing_below_position_0_columns_are_read_from_0_and_prompts_refused():
    """Ministral 3 multiplies queries by the logarithm of their position: below 0 all that follows is no number."""
    base = architectures.build("ministral3")
    model = get_peft_model(base, MoPsConfig(num_experts=2, prompts_per_expert=2, experts="keys_values"))
    layer = model.base_model.layer()
    ids = torch.arange(10, 30)[None]
    found = keys_values.observe(layer.engine.backbone, layer.index, ids)
    assert found.keys.isfinite().all() and found.values.isfinite().all()
    assert (layer.mops_key_size["default"] != 1).all(), "no size was measured"
    for options in (dict(), dict(experts="keys_values", num_recovery_prompts=2)):
        with pytest.raises(ValueError, match="Ministral3ForCausalLM has no attention at positions below 0"):
            get_peft_model(architectures.build("ministral3"), MoPsConfig(num_experts=2, **options))


def test_only_what_the_bare_model_fails_too_is_put_down_to_it():
    both = architectures.rows()
    with torch.no_grad():
        assert architectures._bare_differs(architectures.build("llama"), both) == set()
        assert architectures._bare_differs(architectures.build("marian"), both) == {"padded = alone"}
