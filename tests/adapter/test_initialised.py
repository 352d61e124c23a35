"""Experts that start random though their config asks for text: said once, and only where they are trained."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel

from adapted import adapt
from tiny_models import batch, build

SAID = r"the experts of adapter 'default' are random: call smartmops\.prepare\(model, tokenizer, examples\)"


def said(model) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model(**batch())
    return [str(each.message) for each in found]


def test_training_from_random_experts_warns_once():
    model = adapt()[1].train()
    with pytest.warns(UserWarning, match=SAID):
        model(**batch())
    assert said(model) == []


def test_nothing_is_said_where_nothing_is_amiss():
    assert said(adapt()[1].eval()) == []
    assert said(adapt(init="random")[1].train()) == []


@pytest.mark.parametrize("old", [False, True], ids=["saved now", "saved before it was known"])
def test_loaded_adapters_are_taken_as_they_are(tmp_path, old):
    model = adapt()[1]
    model.save_pretrained(tmp_path)
    if old:
        file = tmp_path / "adapter_config.json"
        file.write_text(file.read_text().replace('  "initialised": false,\n', ""))
        assert "initialised" not in file.read_text()
    loaded = PeftModel.from_pretrained(build(), tmp_path, is_trainable=True).train()
    assert said(loaded) == []
    assert loaded.peft_config["default"].initialised
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch()).logits, model.eval()(**batch()).logits)
