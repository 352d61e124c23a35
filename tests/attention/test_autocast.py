"""Under autocast, products are bfloat16 and all else is as it was: close to float32, in training and in inference."""

from __future__ import annotations

import pytest
import torch
from test_packed import gradients, rows
from torch.nn.functional import cosine_similarity
from transformers import Trainer, TrainingArguments

from adapted import adapt
from smartmops.attention import kernels
from tiny_models import KERNELS, batch, relative


def cast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("packed", [False, True], ids=["padded rows", "packed"])
@pytest.mark.parametrize(("name", "kernel"), KERNELS)
def test_loss_and_gradients_are_close_to_those_of_float32(name, kernel, packed, monkeypatch):
    monkeypatch.setattr(kernels, "LONG", 1)
    _, model = adapt(name, kernel, num_recovery_prompts=2, task_type="CAUSAL_LM")
    inputs = {"packed": rows()[1]} if packed else rows()[0] | {"use_cache": False}
    want, want_grads = gradients(model, **inputs)
    with cast():
        got, got_grads = gradients(model, **inputs)
    assert got != want and got == pytest.approx(want, rel=0.02)
    for name_of, grad in want_grads.items():
        assert got_grads[name_of].dtype == torch.float32
        assert cosine_similarity(got_grads[name_of].flatten(), grad.flatten(), 0) > 0.97, name_of


@torch.no_grad()
@pytest.mark.parametrize(("name", "kernel"), KERNELS)
def test_logits_and_answers(name, kernel):
    plain, model = adapt(name, kernel)
    inputs = batch()
    want, bare = model(**inputs).logits, plain(**{k: v for k, v in inputs.items() if k != "gate_mask"}).logits
    with cast():
        got = model(**inputs).logits
        rough = relative(
            plain(**{k: v for k, v in inputs.items() if k != "gate_mask"}).logits, bare, inputs["attention_mask"]
        )
        answers = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert 0 < relative(got, want, inputs["attention_mask"]) < max(3 * rough, 0.02)
    assert answers.shape[1] > inputs["input_ids"].shape[1]


@torch.no_grad()
def test_a_kept_prefix_is_not_taken_over_into_the_other_precision():
    _, model = adapt()
    exact = model(**batch()).logits
    with cast():
        low = model(**batch()).logits
    assert torch.equal(model(**batch()).logits, exact) and not torch.equal(low, exact)
    with cast():
        assert torch.equal(model(**batch()).logits, low)


def test_trainer_with_bf16_trains(tmp_path):
    _, model = adapt(task_type="CAUSAL_LM")
    data = [{name: value[i] for name, value in rows()[0].items()} for i in range(len(rows()[0]["labels"]))]
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    arguments = TrainingArguments(output_dir=str(tmp_path), bf16=True, use_cpu=True, max_steps=3, report_to="none",
                                  save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
                                  learning_rate=0.05)  # fmt: skip
    done = Trainer(model=model, args=arguments, train_dataset=data).train()
    assert done.training_loss > 0 and all(
        not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before
    )
