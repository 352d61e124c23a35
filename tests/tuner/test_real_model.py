"""The same contract on weights that somebody else trained: a 260 k-parameter Llama, where it is at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from smartmops import MoPsConfig

FOLDER = Path(__file__).resolve().parents[3] / "shared/models/stories260K/hf"


@pytest.fixture
def stories():
    if not FOLDER.is_dir():
        pytest.skip(f"real model: no folder {FOLDER}")
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


def test_a_few_steps_teach_it_and_the_saved_adapter_says_the_same(stories, tmp_path):
    ids = torch.randint(3, 512, (1, 12)).repeat(4, 1)
    labels = ids.clone()
    labels[:, :4] = -100
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    model = get_peft_model(stories, MoPsConfig(num_experts=3, prompts_per_expert=4, task_type="CAUSAL_LM"))
    assert model.peft_config["default"].injection_layer == round(9 / 32 * 5)
    with model.disable_adapter(), torch.no_grad():
        frozen = model(**rows).loss
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(30):
        loss = model(**rows).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert loss < 0.5 * frozen
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        want = model.eval()(**rows).logits
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(FOLDER), tmp_path).eval()
        torch.testing.assert_close(again(**rows).logits, want, rtol=1e-5, atol=1e-5)
    prompt = ids[:1, :4]
    assert torch.equal(model.generate(input_ids=prompt, max_new_tokens=5, do_sample=False, pad_token_id=0),
                       again.generate(input_ids=prompt, max_new_tokens=5, do_sample=False, pad_token_id=0))  # fmt: skip
