"""`smartmops federate`: base, data and a transport in, run folder out.

Knows how task, partition, adapter, rounds and run folder belong together. The default transport is plain calls: one
frozen base and one activation cache serve the server and all clients of this process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.filesize import decimal
from torch import Tensor

from smartmops.base import load_base
from smartmops.checks.errors import ClientsRefused
from smartmops.clients.admission import admitted
from smartmops.clients.holdings import holdings_of, inputs_of_clients
from smartmops.clients.messages import Hello, Local, Transport
from smartmops.clients.roster import Roster, short
from smartmops.evaluation.measure import gates, measured
from smartmops.evaluation.perplexity import Evaluation
from smartmops.flow.steps import adapted, begun, opened, shown
from smartmops.methods.baselines import trained_numbers
from smartmops.options.federation import FederateConfig, ServerConfig
from smartmops.options.method import EMBEDDED_RATE
from smartmops.preparing import gating
from smartmops.progress.bars import console
from smartmops.reading.task import Task, same_inputs
from smartmops.rows.example import of_examples
from smartmops.runs.card import keep, number
from smartmops.runs.folder import Run
from smartmops.states.fingerprint import of_base
from smartmops.tokens.template import Template

from .aggregation import Aggregator, Layout, check
from .client import (
    Worker,
    adapter_words,
    arrays_of,
    split_by_expert,
    train_locally,
)
from .privacy import Private
from .rounds import Server, State


def local_of(config: FederateConfig) -> Local:
    """Of every client's training; the seed is filled in for each."""
    central = config.central()
    absolute = central.traits.ours and config.expert_kind == "hidden_states" and config.prompt_lr is None
    rate = EMBEDDED_RATE[config.init] if absolute else central.rate
    gate_rate = 1e-3 if config.gate_lr is None else config.gate_lr
    return Local(config.local_steps, config.batch_size, rate, gate_rate, 0, config.proximal,
                 half=config.payload == "float16", share_above=config.share_above, head_lr=config.head_lr)  # fmt: skip


class InProcess:
    """Calls a worker of this process, client by client; who takes too long is found out once it is done."""

    def __init__(self, worker: Worker, clock: Callable[[], float] = time.perf_counter) -> None:
        self.worker, self.clock = worker, clock

    def hello(self) -> dict[int, bytes]:
        """Of every client, by number."""
        return {client: self.worker.hello(client) for client in range(len(self.worker.names))}

    def exchange(self, jobs: Mapping[int, bytes], timeout: float | None) -> Iterable[tuple[int, bytes]]:
        """One client after another."""
        started = self.clock()
        for client, blob in jobs.items():
            answer = self.worker.answer(blob)
            if timeout is None or self.clock() - started <= timeout:
                yield client, answer

    def heard(self, clients: Iterable[int]) -> set[int]:
        """All of them: they live in this process."""
        return set(clients)

    def refuse(self, reasons: Mapping[int, str]) -> None:
        """Who runs this process runs the clients, and reads why in its error."""

    def close(self) -> None:
        """Nothing is held."""


def worker_of(config: FederateConfig) -> Worker:
    """All clients of a config in a process of their own, as Flower's simulation wants them."""
    base, tokenizer = load_base(config.model, config.dtype)
    fingerprint = of_base(base, tokenizer, Template.of(config.template, tokenizer))
    central = config.central()
    central.recovery_prompts = 0  # they come with the adapter
    task = Task.load(central, base, tokenizer)
    found = holdings_of(config, task)
    return Worker(found.task, found.rows, found.names, fingerprint)


def federate(config: FederateConfig, connect: Callable[[FederateConfig], Transport] | None = None) -> dict[str, Any]:
    """Train over clients, write the run folder; returns what `metrics.json` holds.

    Args:
        config: Everything `smartmops federate` takes.
        connect: Makes the transport; None: the clients live in this process.

    Raises:
        FileExistsError: `out` holds a run already and `resume` is off.
        ValueError: options, data, base or clients do not fit; the message names value, limit and way out.
        QuorumLost: too few clients answered, again and again.
    """
    with begun("federate", config, config.method, seed=config.seed) as run:
        return run.read_metrics() or _federate(config, run, connect)


def _federate(
    config: FederateConfig, run: Run, connect: Callable[[FederateConfig], Transport] | None
) -> dict[str, Any]:  # fmt: skip
    """`federate`, in a run that is not finished."""
    started, central = time.perf_counter(), config.central()
    base, tokenizer = load_base(config.model, config.dtype)
    fingerprint = of_base(base, tokenizer, Template.of(config.template, tokenizer))
    task, central = opened(central, base, tokenizer)
    same_inputs(run, task, config.unrelated)
    here = connect is None or config.engine != "in-process"  # whether all clients' data are this user's own
    held = holdings_of(config, task) if here else None
    if held is not None and config.clients_data is not None:  # else they hold what the task does
        run.same_inputs(inputs_of_clients(held))
    made, frozen = adapted(task, central)
    model, names = made.model, made.names
    layout = Layout(*split_by_expert(model))
    check(config, layout)
    prepared = time.perf_counter() - started
    if connect is None:
        assert held is not None
        transport: Transport = InProcess(Worker(held.task, held.rows, held.names, fingerprint, model))
    else:
        transport = connect(config)
    try:
        members = _members(transport, config, fingerprint, names if len(names) > 1 else [])
        if not here:
            _tell_of_others(run, members.values())
        known = {client: hello.name for client, hello in members.items()}
        server = _server(config, task, model, layout, transport, known, fingerprint)
        server.holding = None if here else partial(_tell_of_data, run)
        file = run.checkpoints / "round.safetensors"
        state = State.load(file) or State(
            0, {n: v.detach().cpu().float().clone() for n, v in arrays_of(model)[0].items()}
        )
        run.rewind(-1)  # a kill between checkpoint and log loses a row of the log, but never one of the checkpoint
        for row in state.rows:
            run.append_curve(row)

        def keep(state: State) -> None:
            state.save(file)
            run.append_curve(state.rows[-1])

        state = server.run(state, keep)
    finally:
        transport.close()
    extra = {
        "experts": names if layout.experts > 1 else [],
        "gate_pretraining_accuracy": made.accuracy,
        "clients": len(members),
        "holdings": None if held is None else {"names": held.names, "table": held.table},
        "seconds": {"prepare": prepared, "train": sum(row.get("seconds", 0.0) for row in state.rows)},
    }
    return _finish(config, run, task, model, state, frozen.test, extra)


def _tell_of_data(run: Run, data: Mapping[str, str]) -> None:
    """Which clients hold what they did not hold before; it is theirs, so the run goes on."""
    for other in run.other_inputs({f"data of client {name!r}": short(found) for name, found in data.items()}):
        console.print(f"the {other} are not what they were when {run.path} was begun: from here on it trains on these")


def _tell_of_others(run: Run, members: Collection[Hello]) -> None:
    """What a resumed run's clients hold that they did not hold before, and that they are others."""
    names = sorted(hello.name for hello in members)
    _tell_of_data(run, {hello.name: hello.data for hello in members})
    if run.other_inputs({"list of clients": of_examples(names)}):
        console.print(f"the clients are not those that {run.path} was begun with: they are numbered by their names, so "
                      "their draws are others from here on, too")  # fmt: skip


def _members(transport: Transport, config: FederateConfig, base: str, experts: Sequence[str]) -> dict[int, Hello]:
    """As `admitted`; those that cannot take part are told why before this run ends."""
    found = transport.hello()
    try:
        return admitted(found, config, base, experts)
    except ClientsRefused as error:
        transport.refuse(error.reasons)
        raise


def _server(
    config: FederateConfig,
    task: Task,
    model: Any,
    layout: Layout,
    transport: Transport,
    members: Mapping[int, str],
    base: str,
) -> Server:
    """The round loop with everything it asks of the model."""

    def look(arrays: Mapping[str, Tensor]) -> tuple[Evaluation, dict[str, Any]]:
        _take(model, arrays)
        return measured(task, model), gates(task, model) if layout.experts > 1 else {}

    def own(arrays: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        _take(model, arrays)
        rows, collate = task.feed(model)
        local = replace(local_of(config), steps=config.server_steps, seed=seed)
        train_locally(model, lambda chosen: collate([rows[i] for i in chosen]), range(len(rows)), local)
        return _given(model)

    if config.server_steps and config.clients_data is None and not isinstance(config, ServerConfig):
        console.print(f"--server-steps {config.server_steps} trains on DATA, which the clients hold here: give "
                      "--clients-data, so that DATA is the server's own")  # fmt: skip
    private = None
    if config.noise_multiplier is not None:
        private = Private(config, len(members), config.clients_per_round / len(members))
    return Server(
        config=config,
        seed=config.seed,
        local=local_of(config),
        adapter=adapter_words(model),
        base=base,
        constants={name: value.detach().cpu().clone() for name, value in arrays_of(model)[1].items()},
        roster=Roster(members),
        layout=layout,
        aggregator=Aggregator(config, layout),
        transport=transport,
        look=look,
        own=own if config.server_steps else None,
        private=private,
    )


def _given(model: Any) -> dict[str, Tensor]:
    """Copies of the trained arrays of the server's model."""
    return {name: value.detach().cpu().float().clone() for name, value in arrays_of(model)[0].items()}


@torch.no_grad()
def _take(model: Any, arrays: Mapping[str, Tensor]) -> None:
    """Trained arrays into the server's model."""
    own = arrays_of(model)[0]
    for name, value in arrays.items():
        own[name].copy_(value)


def _finish(
    config: FederateConfig, run: Run, task: Task, model: Any, state: State, frozen: Evaluation, extra: dict[str, Any]
) -> dict[str, Any]:
    """Adapter, gates, samples and, last, the numbers."""
    _take(model, state.arrays)
    keep(run, model, task.template)
    rows = state.rows
    seen = [row for row in rows if "eval_perplexity" in row]
    if names := extra.pop("experts"):
        stages = {"before": seen[0], "during": seen[len(seen) // 2], "after": seen[-1]}
        about = {"experts": names, "left_to_base": gating.leaves(model)}
        run.write_gates(about | {stage: row["gates"] for stage, row in stages.items()})
    shown(run, task, model, config)
    keys = ("round", "bytes_up", "bytes_down", "clients_ok", "clients_failed", "failures", "left_out", "loss", "drift",
            "mass", "epsilon", "perplexity", "seconds")  # fmt: skip
    metrics = {
        "perplexity": seen[-1]["perplexity"],
        "tokens": seen[-1]["tokens"],
        "perplexity_frozen": frozen.metrics()["perplexity"],
        "gained": seen[-1]["perplexity"]["overall"] < frozen.overall,
        "rounds": [{key: row[key] for key in keys if key in row} for row in rows],
        "bytes_up": sum(row.get("bytes_up", 0) for row in rows),
        "bytes_down": sum(row.get("bytes_down", 0) for row in rows),
        "clients_failed": sum(row.get("clients_failed", 0) for row in rows),
        "trainable_parameters": trained_numbers(model),
        "examples": {"test": len(task.test)},
        **config.measured_on,
        **extra,
    }
    console.print(f"sent to clients {decimal(metrics['bytes_down'])}, received {decimal(metrics['bytes_up'])} in "
                  f"{state.round} rounds; {metrics['clients_failed']} answers failed")  # fmt: skip
    number(run, task.template, metrics)
    run.write_metrics(metrics)
    return metrics
