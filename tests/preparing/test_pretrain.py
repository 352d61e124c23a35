"""Recovery prompts, experts from hidden states, gate pretraining: what each may read and what it leaves behind."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from smartmops.evaluation.perplexity import answer, evaluate
from smartmops.federated.federate import FederateConfig
from smartmops.flow.trainer import TrainConfig
from smartmops.methods.baselines import MethodConfig, build
from smartmops.preparing.adapting import adapt, recovered
from smartmops.preparing.initial import initialise
from smartmops.preparing.pretrain import assign, train_recovery
from smartmops.reading.task import Task
from smartmops.states.instructions import instructions

Make = Callable[..., TrainConfig]


@pytest.fixture
def task(config: Make) -> Task:
    return Task.load(config())


def test_recovery_prompts_lower_the_loss_and_leave_the_base_untouched(task: Task) -> None:
    before = {name: value.clone() for name, value in task.base.state_dict().items()}
    frozen = evaluate(task.base, task.test, task.collator).overall
    found = train_recovery(task.base, task.train, task.collator, 4, 20, 0.03, 8, seed=0)
    assert found.shape == (4, 32)
    after = task.base.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert evaluate(task.base, task.test, task.collator).overall == frozen
    ungated = MethodConfig(method="prompt-tuning", experts=1, expert_kind="hidden_states")
    model = build(task.base, ungated, recovery=found)
    model.base_model.layer().mops_prompts["default"].data.zero_()
    assert evaluate(model, task.test, task.collator).overall < frozen


def test_the_gate_never_reads_a_response(task: Task, config: Make) -> None:
    model, _, _ = adapt(task, config(), config(), seed=0)
    seen = instructions(model, task.train)
    changed = [
        dataclasses.replace(row, input_ids=[i if label == -100 else 5 for i, label in zip(row.input_ids, row.labels)])  # noqa: B905
        for row in task.train
    ]
    torch.testing.assert_close(instructions(model, changed), seen, rtol=0, atol=1e-6)


def test_experts_start_as_hidden_states_of_their_own_task(task: Task, config: Make) -> None:
    model, names, accuracy = adapt(task, config(), config(), seed=0)
    assert names == ["a", "b"] and accuracy == 1.0
    tuner, prompts = model.base_model, model.base_model.layer().mops_prompts["default"]
    for expert, name in enumerate(names):
        batch = task.collator([row for row in task.train if row.category == name])
        states = tuner.hidden_at_injection(batch["input_ids"], batch["attention_mask"]).flatten(0, 1)
        distance = torch.cdist(prompts[3 * expert : 3 * expert + 3], states).min(-1).values
        assert distance.max() < 1e-4


def test_initialising_twice_with_one_seed_gives_the_same_prompts(task: Task, config: Make) -> None:
    model, _, _ = adapt(task, config(), config(), seed=0)
    prompts = model.base_model.layer().mops_prompts["default"]
    for expected in (True, False):
        before = prompts.detach().clone()
        expert_of = [0 if row.category == "a" else 1 for row in task.train]
        initialise(model, task.train, task.collator, expert_of, seed=0 if expected else 1)
        assert torch.equal(before, prompts) == expected


@pytest.mark.parametrize("kind", ["hidden_states", "keys_values"])
def test_without_categories_experts_are_meant_for_clusters(
    config: Make, two_tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    rows = [json.loads(line) for line in two_tasks.read_text().splitlines()]
    file = tmp_path / "nameless.jsonl"
    file.write_text("".join(json.dumps({"q": row["instruction"], "a": row["response"]}) + "\n" for row in rows))
    chosen = config(data=str(file), columns=("instruction=q", "response=a"), expert_kind=kind)
    task = Task.load(chosen)
    _, names, accuracy = adapt(task, chosen, chosen, seed=0)
    assert names == ["cluster 0", "cluster 1"] and accuracy is not None
    assert "no example has a category, so each expert is meant for a cluster" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no example has a category: add one"):
        adapt(task, chosen, config(expert_names=("a", "b")), seed=0)


def test_labels_and_clusters_that_cannot_be_are_refused(task: Task) -> None:
    pooled = torch.randn(len(task.train), 4)
    nameless = [dataclasses.replace(row, category="") for row in task.train]
    with pytest.raises(
        ValueError, match="--gate-pretraining labels, but no example has a category: add one, or choose clusters"
    ):
        assign(nameless, pooled, 2, "labels", 0)
    with pytest.raises(ValueError, match=r"--expert-names a c lack category 'b': name an expert for it"):
        assign(task.train, pooled, 2, "labels", 0, given=("a", "c"))
    expert_of, names = assign(task.train, pooled, 3, "labels", 0, given=("b", "a"))
    assert names == ["b", "a", "expert 2"]
    assert expert_of == [names.index(row.category) for row in task.train]
    with pytest.raises(ValueError, match="cannot form 99 clusters"):
        assign(task.train, pooled, 99, "clusters", 0)


def test_answers_do_not_depend_on_who_shares_the_batch(task: Task, config: Make) -> None:
    model, _, _ = adapt(task, config(), config(), seed=0)
    together = answer(model, task.tokenizer, task.test_examples, max_new_tokens=6)
    alone = [answer(model, task.tokenizer, [example], max_new_tokens=6)[0] for example in task.test_examples]
    assert together == alone


def test_perplexity_is_over_response_tokens_of_all_rows(task: Task) -> None:
    result = evaluate(task.base, task.test, task.collator, batch_size=3)
    nats, tokens = 0.0, 0
    for row in task.test:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        count = int((labels[:, 1:] != -100).sum())
        nats += task.base(input_ids=ids, labels=labels).loss.item() * count
        tokens += count
    assert sum(result.tokens.values()) == tokens
    assert result.overall == pytest.approx(torch.tensor(nats / tokens).exp().item(), rel=1e-5)
    with pytest.raises(ValueError, match="0 examples to evaluate"):
        evaluate(task.base, [], task.collator)


def test_recovery_prompts_go_with_hidden_states_and_not_on_a_base_that_is_adapted(config: Make) -> None:
    anywhere = {"model": "tiny", "data": "office", "out": Path("nowhere")}
    assert TrainConfig(**anywhere).recovered_by == 0
    assert TrainConfig(**anywhere, expert_kind="hidden_states").recovered_by == 10
    assert FederateConfig(**anywhere).recovered_by == 0
    chosen = config(recovery_prompts=2, recovery_steps=2)
    made = recovered(Task.load(chosen), chosen)
    assert made.recovery is not None and len(made.recovery) == 2
    assert recovered(Task.load(chosen), dataclasses.replace(chosen, method="lora")).recovery is None
    model, _, _ = adapt(made, chosen, chosen, 0)
    assert recovered(Task.load(chosen, model, made.tokenizer), chosen).recovery is None
