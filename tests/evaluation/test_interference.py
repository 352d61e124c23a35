"""Gradient agreement between tasks: against gradients by hand, and without a trace in the run that is measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from smartmops.evaluation import interference as measure
from smartmops.evaluation.interference import agreement, gradients, interference
from smartmops.flow.trainer import TrainConfig, train
from smartmops.preparing.adapting import adapt
from smartmops.preparing.selection import told
from smartmops.reading.task import Task
from smartmops.runs.folder import Run
from smartmops.tokens.batches import Collator

Make = Callable[..., TrainConfig]


def adapted(config: TrainConfig) -> tuple[Task, Any]:
    task = told(Task.load(config), config, 0)
    return task, adapt(task, config, config, 0)[0]


@pytest.mark.parametrize("budget", [2048, 40])
@pytest.mark.parametrize("activations", ["memory", "off"])
@pytest.mark.parametrize(
    "how",
    [
        {}, {"method": "prompt-tuning"}, {"gate_target": "hidden_states"},
        {"expert_kind": "keys_values", "null_expert": False},
    ],
)  # fmt: skip
def test_a_gradient_is_that_of_a_padded_batch(
    config: Make, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], activations: str, budget: int
) -> None:
    monkeypatch.setattr(measure, "BUDGET", budget)
    task, model = adapted(config(activations=activations, **how))
    found = gradients(task, model, 5)
    assert list(found) == ["a", "b"]
    layer = model.base_model.layer()
    names = ("mops_keys", "mops_values") if "expert_kind" in how else ("mops_prompts",)
    prompts = [getattr(layer, name)["default"] for name in names]
    model.eval()
    for name, value in found.items():
        rows = [row for row in task.train if row.category == name][:5]
        batch = Collator(task.tokenizer, gate_mask=True)(rows)
        if "expert_kind" not in how:
            batch["gate_mask"] = batch["labels"] == -100
        logits = model(**batch, use_cache=False).logits
        labels = batch["labels"][:, 1:]
        nats = torch.nn.functional.cross_entropy(logits[:, :-1][labels != -100], labels[labels != -100])
        wanted = torch.cat([each.flatten(1) for each in torch.autograd.grad(nats, prompts)], 1)
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()) + 1e-8)


def test_agreement_of_known_gradients() -> None:
    found = agreement({
        "a": torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "b": torch.tensor([[0.0, 2.0], [0.0, 0.0]]),
        "c": torch.tensor([[-3.0, 0.0], [0.0, 4.0]]), "none": torch.zeros(2, 2),
    })  # fmt: skip
    assert found["cosines"] == {
        "a | b": 0, "a | c": pytest.approx(-0.6), "a | none": 0, "b | c": 0, "b | none": 0, "c | none": 0
    }  # fmt: skip
    assert found["mean_cosine"] == pytest.approx(-0.1) and found["conflicting"] == pytest.approx(1 / 6)
    nearly = agreement({"a": torch.tensor([[1.0, 0.0]]), "b": torch.tensor([[-1e-9, 1.0]])})
    assert nearly["cosines"]["a | b"] < 0 and nearly["conflicting"] == 0


def test_measuring_leaves_no_trace(config: Make) -> None:
    task, model = adapted(config())
    model.train()
    model.base_model.layer().base_layer.mlp.eval()
    modes = [module.training for module in model.modules()]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    interference(task, model, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", ["mops", "prompt-tuning"])
def test_a_measured_run_is_the_same_run_bit_for_bit(config: Make, tmp_path: Path, method: str) -> None:
    plain = train(config(method=method, out=tmp_path / "plain"))
    metrics = train(config(method=method, out=tmp_path / "measured", interference_examples=4))
    found = metrics.pop("interference")
    assert metrics | {"seconds": 0} == plain | {"seconds": 0}
    for stage in ("before", "after"):
        assert set(found[stage]) == {"mean_cosine", "cosines", "conflicting"}
        assert found[stage]["cosines"] == {"a | b": found[stage]["mean_cosine"]}
        assert found[stage]["conflicting"] == float(found[stage]["mean_cosine"] < -measure.ROUNDING)
    assert found["before"] != found["after"]
    assert Run.open(tmp_path / "measured").read_metrics()["interference"] == found


def test_tasks_with_experts_of_their_own_never_meet(config: Make) -> None:
    assert interference(*adapted(config(method="oracle")), 4)["cosines"] == {"a | b": 0}


def test_seeds_differ_and_peft_methods_have_none(config: Make, tmp_path: Path) -> None:
    found = [train(config(out=tmp_path / str(seed), seed=seed, steps=2, interference_examples=2)) for seed in (0, 1)]
    assert found[0]["interference"] != found[1]["interference"]
    assert "interference" not in train(config(out=tmp_path / "lora", method="lora", steps=1, interference_examples=2))


def test_bad_input_names_value_and_way_out(config: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--interference-examples -1: choose 0 or more"):
        train(config(interference_examples=-1))
    lone = tmp_path / "lone.jsonl"
    rows = [{"instruction": f"Count {i}.", "response": "one"} for i in range(12)]
    lone.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"\[''\] is the only task that is trained on"):
        train(config(out=tmp_path / "other", data=str(lone), gate_pretraining="clusters", interference_examples=2))
