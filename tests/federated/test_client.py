"""A client's round: the steps central training would make, for any adapter, and nothing but trained arrays goes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from smartmops.base import load_base
from smartmops.clients.messages import Failure, Hello, Job, Local, Reply, pack, unpack
from smartmops.federated.client import Worker, adapter_words, arrays_of, load_arrays, order, train_locally
from smartmops.federated.federate import FederateConfig, local_of
from smartmops.preparing.adapting import adapt
from smartmops.reading.task import Task
from smartmops.states.fingerprint import of_base
from smartmops.tokens.template import Template

LOCAL = Local(steps=5, batch_size=4, prompt_lr=0.1, gate_lr=1e-3, seed=11)


@pytest.fixture
def adapted(config: Callable[..., FederateConfig]) -> tuple[Task, Any, str]:
    return made(config())


def made(settings: FederateConfig) -> tuple[Task, Any, str]:
    base, tokenizer = load_base(settings.model, "float32")
    fingerprint = of_base(base, tokenizer, Template.of(settings.template, tokenizer))
    task = Task.load(settings.central(), base, tokenizer)
    return task, adapt(task, settings.central(), settings, settings.seed)[0], fingerprint


def job(model: Any, base: str, local: Local = LOCAL, client: int = 0) -> Job:
    trained, constants = arrays_of(model)
    arrays = {name: value.detach().clone() for name, value in {**trained, **constants}.items()}
    return Job(1, client, local, adapter_words(model), base, arrays)


def answered(worker: Worker, job: Job) -> Reply:
    reply = unpack(worker.answer(pack(job)))
    assert isinstance(reply, Reply), reply
    return reply


@pytest.mark.parametrize(("granularity", "travels"), [("expert", False), ("prompt", True)])
def test_the_gate_of_a_single_expert_travels_where_it_weighs_prompts(
    config: Callable[..., FederateConfig], granularity: str, travels: bool
) -> None:
    model = made(config(experts=1, gate_granularity=granularity))[1]
    assert any("mops_gate" in name for name in arrays_of(model)[0]) == travels


@pytest.mark.parametrize(("count", "size", "seed"), [(10, 4, 3), (7, 7, 0), (3, 8, 5)])
def test_batches_come_in_the_order_of_the_trainer(count: int, size: int, seed: int, tmp_path: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=size, seed=1, data_seed=seed, report_to="none",
        remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(torch.nn.Linear(1, 1), arguments, train_dataset=list(range(count)), data_collator=list)
    loader: DataLoader[Any] = trainer.get_train_dataloader()
    theirs = [batch for epoch in range(3) for batch in epoch_of(loader, epoch)]
    assert list(order(count, size, len(theirs), seed)) == theirs


def epoch_of(loader: Any, epoch: int) -> list[list[int]]:
    loader.set_epoch(epoch)
    return [[int(i) for i in batch] for batch in loader]


def test_a_reply_holds_trained_arrays_alone_and_leaves_the_base_as_it_was(adapted: tuple[Task, Any, str]) -> None:
    task, model, base = adapted
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    worker = Worker(task, [[0, 1, 2], [3, 4]], ["x", "y"], base, model)
    sent = job(model, base, client=1)
    reply = answered(worker, sent)
    assert reply.arrays.keys() == {n for n in sent.arrays if any(t in n for t in ("prompts", "gate_in", "gate_out"))}
    assert (reply.examples, reply.round, reply.client) == (2, 1, 1)
    assert all(not torch.equal(reply.arrays[n], sent.arrays[n]) for n in reply.arrays)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)
    assert reply.mass is not None and sum(reply.mass) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["hidden_states", "keys_values"])
def test_a_worker_of_its_own_answers_as_one_that_shares_the_servers_model(
    config: Callable[..., FederateConfig], kind: str
) -> None:
    settings = config(expert_kind=kind)
    task, model, base = made(settings)
    sent = job(model, base)
    shared = answered(Worker(task, [[0, 1, 2, 5]], ["x"], base, model), sent)
    other, tokenizer = load_base(settings.model, "float32")
    own = answered(Worker(Task.load(settings.central(), other, tokenizer), [[0, 1, 2, 5]], ["x"], base), sent)
    assert all(torch.equal(own.arrays[n], shared.arrays[n]) for n in shared.arrays)
    assert own.mass == shared.mass and own.loss == shared.loss


def test_a_client_forgets_everything_between_rounds(adapted: tuple[Task, Any, str]) -> None:
    task, model, base = adapted
    worker = Worker(task, [[0, 1, 2], [3, 4, 5, 6]], ["x", "y"], base, model)
    sent = job(model, base)
    first = answered(worker, sent)
    answered(worker, job(model, base, replace(LOCAL, seed=3, steps=2), client=1))
    again = answered(worker, sent)
    assert all(torch.equal(first.arrays[n], again.arrays[n]) for n in first.arrays)


@pytest.mark.parametrize("method", ["fedprompt", "fedlora"])
def test_other_adapters_go_through_the_same_code(config: Callable[..., FederateConfig], method: str) -> None:
    task, model, base = made(config(method=method))
    worker = Worker(task, [[0, 1, 2, 3]], ["x"], base, model)
    reply = answered(worker, job(model, base))
    assert reply.mass is None and reply.experts is None
    expected = {"fedprompt": "mops_prompts", "fedlora": "lora_"}[method]
    assert reply.arrays and all(expected in name for name in reply.arrays)


def test_the_loss_falls_on_what_the_client_holds(adapted: tuple[Task, Any, str]) -> None:
    task, model, _ = adapted
    rows, collate = task.feed(model)
    losses = [
        train_locally(model, lambda chosen: collate([rows[i] for i in chosen]), range(8), replace(LOCAL, steps=steps))
        for steps in (1, 20, 20)
    ]
    assert losses[2] < losses[1] < losses[0]


def test_fedprox_stays_nearer_to_what_was_received(adapted: tuple[Task, Any, str]) -> None:
    task, model, base = adapted
    worker = Worker(task, [[0, 1, 2, 3]], ["x"], base, model)
    moved = []
    for mu in (0.0, 10.0):
        sent = job(model, base, replace(LOCAL, proximal=mu, steps=20))
        reply = answered(worker, sent)
        load_arrays(model, sent.arrays)
        moved.append(sum(float((reply.arrays[n] - sent.arrays[n]).square().sum()) for n in reply.arrays))
    assert moved[1] < 0.9 * moved[0]


def test_half_precision_sends_differences_of_half_the_bytes(adapted: tuple[Task, Any, str]) -> None:
    task, model, base = adapted
    worker = Worker(task, [[0, 1, 2, 3]], ["x"], base, model)
    sent = job(model, base)
    whole = answered(worker, sent)
    half = answered(worker, replace(sent, local=replace(LOCAL, half=True)))
    assert half.difference and not whole.difference
    for name, value in half.arrays.items():
        assert value.dtype == torch.float16
        torch.testing.assert_close(sent.arrays[name] + value.float(), whole.arrays[name], rtol=1e-3, atol=1e-3)
    size = [sum(v.nbytes for v in each.arrays.values()) for each in (whole, half)]
    assert size[1] * 2 == size[0]


@pytest.mark.parametrize("kind", ["hidden_states", "keys_values"])
def test_experts_that_are_hardly_used_stay_at_home(config: Callable[..., FederateConfig], kind: str) -> None:
    task, model, base = made(config(expert_kind=kind))
    of_a = [i for i, row in enumerate(task.train) if row.category == "a"][:4]
    worker = Worker(task, [of_a], ["x"], base, model)
    reply = answered(worker, job(model, base, replace(LOCAL, share_above=0.5, steps=1)))
    assert reply.mass is not None and reply.experts == [e for e, m in enumerate(reply.mass) if m > 0.5]
    assert len(reply.experts) < 2
    names = [n for n in reply.arrays if "gate" not in n]
    assert len(names) == {"hidden_states": 1, "keys_values": 2}[kind]
    width = {"hidden_states": (32,), "keys_values": (3, 2, 8)}[kind]  # layers, key heads, width of one
    assert all(reply.arrays[name].shape == (3 * len(reply.experts), *width) for name in names)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"base": "other"}, "load the same model"), ({"arrays": {}}, "is missing from what was received")],
)
def test_a_job_that_does_not_fit_is_answered_with_the_reason(
    adapted: tuple[Task, Any, str], change: dict[str, Any], said: str
) -> None:
    task, model, base = adapted
    worker = Worker(task, [[0, 1]], ["x"], base, model)
    found = unpack(worker.answer(pack(replace(job(model, base), **change))))
    assert isinstance(found, Failure) and said in found.reason and (found.round, found.client) == (1, 0)


def test_a_job_with_another_shape_is_answered_with_both_shapes(adapted: tuple[Task, Any, str]) -> None:
    task, model, base = adapted
    sent = job(model, base)
    name = next(n for n in sent.arrays if "prompts" in n)
    found = unpack(Worker(task, [[0]], ["x"], base, model).answer(
        pack(replace(sent, arrays=sent.arrays | {name: torch.zeros(5, 32)}))
    ))  # fmt: skip
    assert isinstance(found, Failure) and "[5, 32], here of [6, 32]" in found.reason


@pytest.mark.parametrize("blob", [b"", b"noise" * 20, pack(Failure(1, 2, "x"))])
def test_what_is_no_job_is_answered_too(adapted: tuple[Task, Any, str], blob: bytes) -> None:
    task, model, base = adapted
    found = unpack(Worker(task, [[0]], ["x"], base, model).answer(blob))
    assert isinstance(found, Failure) and ("damaged" in found.reason or "a Failure came" in found.reason)


def test_a_loss_that_is_not_finite_is_a_failure_with_the_step(adapted: tuple[Task, Any, str]) -> None:
    task, model, base = adapted
    sent = job(model, base, replace(LOCAL, prompt_lr=float("inf"), steps=6))
    found = unpack(Worker(task, [[0, 1, 2]], ["x"], base, model).answer(pack(sent)))
    assert isinstance(found, Failure) and "at local step" in found.reason


def test_hello_says_who_and_how_many_and_no_text(adapted: tuple[Task, Any, str]) -> None:
    task, model, base = adapted
    hello = unpack(Worker(task, [[0, 1, 2], [3]], ["x", "y"], base, model).hello(1))
    assert isinstance(hello, Hello)
    assert (hello.name, hello.examples, hello.base) == ("y", 1, base) and hello.categories == [task.train[3].category]
    assert {"torch", "peft", "messages"} <= hello.versions.keys()


def test_hello_tells_other_data_from_the_same_and_only_under_the_clients_secret(adapted: tuple[Task, Any, str]) -> None:
    task, model, base = adapted

    def told(rows: list[int], secret: bytes = b"a") -> str:
        hello = unpack(Worker(task, [rows], ["x"], base, model, secret).hello(0))
        assert isinstance(hello, Hello)
        return hello.data

    assert told([0, 1]) == told([0, 1]) != told([0, 2])
    assert told([0, 1]) != told([0, 1], b"b")


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_the_rate_of_head_weights_reaches_the_clients(config: Callable[..., FederateConfig], rate: float) -> None:
    given = config(expert_kind="keys_values", prefix_attention="separate", head_lr=rate)
    task, model, base = made(given)
    worker = Worker(task, [list(range(8))], ["a"], base, model)
    sent = job(model, base, replace(local_of(given), seed=1))
    heads = [name for name in sent.arrays if "head_weight" in name]
    arrays = answered(worker, sent).arrays
    assert heads and all(torch.equal(arrays[name], sent.arrays[name]) == (rate == 0) for name in heads)
