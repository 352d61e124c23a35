"""Gates that nobody trains: what they choose, that training leaves them alone, and what they share with the learned one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from smartmops.base import load_base
from smartmops.experts.gate import log_gate
from smartmops.flow.trainer import TrainConfig, train
from smartmops.methods.baselines import MethodConfig, build
from smartmops.preparing.adapting import adapt
from smartmops.preparing.pretrain import GatePretraining
from smartmops.preparing.selection import told, wire
from smartmops.reading.task import Task, TaskConfig
from smartmops.states.instructions import instructions


@pytest.fixture
def adapted(two_tasks: Path) -> Callable[[str], tuple[Task, Any, list[str]]]:
    def make(method: str, **options: Any) -> tuple[Task, Any, list[str]]:
        config = TaskConfig(
            model="tiny",
            data=str(two_tasks),
            dtype="float32",
            method=method,
            experts=2,
            prompts_per_expert=3,
            **options,
        )
        task = told(Task.load(config), config, 0)
        model, names, _ = adapt(task, config, GatePretraining(gate_pretraining_steps=20), 0)
        return task, model, names

    return make


def weights(task: Task, model: Any, rows: Any) -> torch.Tensor:
    return model.base_model.layer().gate(instructions(model, rows), "default").detach()


def test_the_oracle_opens_the_expert_of_the_task_and_closes_all_others(adapted: Callable[..., Any]) -> None:
    task, model, names = adapted("oracle")
    for rows in (task.train, task.test):
        wanted = torch.eye(2)[[names.index(row.category) for row in rows]]
        assert torch.equal(weights(task, model, rows), wanted)


def test_the_nearest_cluster_is_found_for_every_row_of_both_splits(adapted: Callable[..., Any]) -> None:
    task, model, _ = adapted("nearest-cluster")
    for rows in (task.train, task.test):
        found = weights(task, model, rows)
        assert torch.equal(found.sort(-1).values, torch.tensor([0.0, 1.0]).expand(len(rows), 2))
        of = {row.category: set() for row in rows}
        for row, weight in zip(rows, found, strict=True):
            of[row.category].add(int(weight.argmax()))
        assert of["a"] != of["b"]  # two so different tasks are two clusters
    assert all(row.gate_embedding is not None for row in task.test)


@pytest.mark.parametrize("method", ["oracle", "nearest-cluster"])
@pytest.mark.parametrize("kind", ["keys_values", "hidden_states"])
def test_all_prompts_of_the_expert_that_is_told_are_open_with_a_weight_a_prompt_too(
    adapted: Callable[..., Any], method: str, kind: str
) -> None:
    found = []
    for granularity in ("expert", "prompt"):
        task, model, _ = adapted(method, expert_kind=kind, gate_granularity=granularity)
        rows, collate = task.feed(model)
        with torch.no_grad():
            found.append((weights(task, model, task.train), model(**collate(rows[:4])).loss))
    (one, loss), (other, same) = found
    assert torch.equal(one, other) and one.shape[1] == 2 and torch.equal(loss, same)


def test_the_even_gate_is_even_and_stays_so(two_tasks: Path, tmp_path: Path, adapted: Callable[..., Any]) -> None:
    task, model, _ = adapted("uniform-gate")
    assert torch.allclose(weights(task, model, task.test), torch.full((len(task.test), 2), 0.5))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and not any("gate" in name for name in trained)


@pytest.mark.parametrize("method", ["oracle", "nearest-cluster"])
def test_each_of_many_experts_can_be_told(method: Any) -> None:
    base, _ = load_base("tiny", "float32")
    model = build(base, MethodConfig(method=method, experts=5, prompts_per_expert=1, gate_hidden_size=3), width=5)
    wire(model)
    assert torch.equal(model.base_model.layer().gate(torch.eye(5), "default").detach(), torch.eye(5))


@pytest.mark.parametrize("method", ["uniform-gate", "oracle", "nearest-cluster", "top-1"])
def test_every_one_trains_end_to_end_and_lowers_the_perplexity(two_tasks: Path, tmp_path: Path, method: Any) -> None:
    config = TrainConfig(model="tiny", data=str(two_tasks), out=tmp_path / "run", method=method, experts=2,
                         dtype="float32", prompts_per_expert=3, steps=15, batch_size=4, warmup_steps=0, prompt_lr=1.0)  # fmt: skip
    metrics = train(config)
    assert metrics["perplexity"]["overall"] < 0.8 * metrics["perplexity_frozen"]["overall"]


def test_a_kept_weight_that_is_not_renormalised_has_a_gradient() -> None:
    torch.manual_seed(0)
    pooled, w_in = torch.randn(5, 4), torch.randn(6, 4)
    w_out = torch.randn(3, 6, requires_grad=True)
    full = log_gate(pooled, torch.zeros(4), torch.ones(4), w_in, w_out).exp()
    kept = log_gate(pooled, torch.zeros(4), torch.ones(4), w_in, w_out, top_k=1, renormalise=False).exp()
    assert torch.allclose(kept.max(-1).values, full.max(-1).values)
    assert (kept.sum(-1) < 1).all() and ((kept > 0).sum(-1) == 1).all()
    kept.sum().backward()
    assert w_out.grad is not None and w_out.grad.abs().max() > 0
    alone = log_gate(pooled, torch.zeros(4), torch.ones(4), w_in, w_out.detach().requires_grad_(), top_k=1).exp()
    assert torch.equal(alone.max(-1).values, torch.ones(5))


def test_who_is_told_the_task_cannot_answer_an_unknown_one(two_tasks: Path) -> None:
    config = TaskConfig(model="tiny", data=str(two_tasks), method="oracle", experts=1)
    with pytest.raises(ValueError, match="--experts 1, but there are 2 tasks: choose 2"):
        told(Task.load(config), config, 0)


def test_a_lora_can_begin_above_the_lower_layers() -> None:
    base, _ = load_base("tiny", "float32")
    model = build(base, MethodConfig(method="lora", lora_from=3))
    where = {int(name.split(".layers.")[1].split(".")[0]) for name, p in model.named_parameters() if p.requires_grad}
    assert where == set(range(3, base.config.num_hidden_layers))
