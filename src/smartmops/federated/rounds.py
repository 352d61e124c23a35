"""The round loop: who is asked, what their answers make of the adapter, what is logged, kept and resumed.

Knows blobs, numbers and files. Every draw depends on seed, round and client alone, so a resumed run is the same run.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.filesize import decimal
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from smartmops.checks.errors import DiskError, QuorumLost, RunError
from smartmops.checks.folders import replacing
from smartmops.clients.messages import Failure, Job, Local, Lost, Made, Transport, pack
from smartmops.clients.roster import Roster, listed, short
from smartmops.evaluation.perplexity import Evaluation
from smartmops.options.federation import AggregationConfig, RoundsConfig
from smartmops.progress.bars import console, counted

from .aggregation import Aggregator, Layout, Update, admit, drift
from .privacy import Private


@dataclass
class State:
    """All that a run needs to go on: after `round` rounds."""

    round: int
    arrays: dict[str, Tensor]  # trained ones, float32
    server: dict[str, Tensor] = field(default_factory=dict)  # of the aggregation (FedAdam's moments)
    private: dict[str, Any] | None = None  # what has been spent of privacy
    rows: list[dict[str, Any]] = field(default_factory=list)  # of every round so far, 0 included

    def save(self, file: Path) -> None:
        """Whole or not at all.

        Raises:
            DiskError: it cannot be written, for one because the disk is full; what stood there still stands.
        """
        words = {"round": self.round, "private": self.private, "rows": self.rows}
        tensors = {f"arrays/{n}": v for n, v in self.arrays.items()} | {
            f"server/{n}": v for n, v in self.server.items()
        }
        laid = {name: value.contiguous() for name, value in tensors.items()}
        try:
            with replacing(file) as fresh:
                save_file(laid, fresh, {"state": json.dumps(words)})
        except (OSError, SafetensorError) as error:
            raise DiskError(f"the checkpoint of round {self.round} cannot be written to {file} ({error}): make room "
                            "and go on with --resume") from error  # fmt: skip

    @classmethod
    def load(cls, file: Path) -> State | None:
        """What `save` wrote; None where there is nothing.

        Raises:
            RunError: the file is damaged.
        """
        if not file.is_file():
            return None
        opened: Any
        try:
            with safe_open(file, "pt") as opened:
                words = json.loads(opened.metadata()["state"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  no mapping
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{file} is damaged ({error}): remove it to start again from round 0") from error
        kinds: dict[str, dict[str, Tensor]] = {"arrays": {}, "server": {}}
        for name, value in tensors.items():
            kind, _, rest = name.partition("/")
            kinds[kind][rest] = value
        return cls(words["round"], kinds["arrays"], kinds["server"], words["private"], words["rows"])


def chosen(seed: int, number: int, attempt: int, members: Sequence[int], count: int) -> list[int]:
    """Clients of a round, drawn without replacement from (seed, round, attempt), in ascending order."""
    rng = np.random.default_rng([seed, number, attempt])
    return sorted(int(each) for each in rng.choice(np.asarray(members), min(count, len(members)), replace=False))


def seed_of(seed: int, number: int, client: int) -> int:
    """Of a client's local training in a round; client -1 is the server itself. Below 2^31."""
    return int(np.random.SeedSequence([seed, number, client + 1]).generate_state(1)[0] >> 1)


@dataclass
class Outcome:
    """One attempt at a round."""

    updates: list[Update]
    failures: list[Failure]
    left_out: list[dict[str, Any]]
    bytes_down: int
    bytes_up: int


class Answers(Iterable[tuple[int, bytes]]):
    """What comes back of a round, to be gone through once: who answered, how much, and who was lost on the way."""

    def __init__(self, found: Iterable[tuple[int, bytes | Lost]]) -> None:
        self._found = found
        self.came: list[int] = []
        self.lost: dict[int, str] = {}
        self.size = 0  # bytes

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        for client, answer in self._found:
            if isinstance(answer, Lost):
                self.lost[client] = answer.reason
            else:
                self.came.append(client)
                self.size += len(answer)
                yield client, answer


@dataclass
class Server:
    """The round loop over one transport.

    Attributes:
        config: Of the rounds.
        local: Of every client's training; each gets a seed of its own.
        adapter: PEFT's config of the adapter.
        base: Fingerprint of the frozen base.
        constants: The adapter's tensors that nobody trains.
        roster: Of the clients.
        look: Evaluates trained arrays, and says what the gate does with them.
        own: Trains arrays on the server's own examples, with a seed; None: there are none.
        holding: Told what clients of these names have trained on, by what tells their data from any others.
    """

    config: RoundsConfig
    seed: int
    local: Local
    adapter: dict[str, Any]
    base: str
    constants: Mapping[str, Tensor]
    roster: Roster
    layout: Layout
    aggregator: Aggregator
    transport: Transport
    look: Callable[[Mapping[str, Tensor]], tuple[Evaluation, dict[str, Any]]]
    own: Callable[[Mapping[str, Tensor], int], dict[str, Tensor]] | None = None
    private: Private | None = None
    holding: Callable[[Mapping[str, str]], None] | None = None

    @property
    def quorum(self) -> int:
        """Answers without which a round does not count."""
        count = min(self.config.clients_per_round, len(self.roster.names))
        return -(-count // 2) if self.config.quorum is None else self.config.quorum

    def run(self, state: State, keep: Callable[[State], None]) -> State:
        """All rounds that are left; `keep` is called after each.

        Raises:
            QuorumLost: too few clients answered in every attempt at a round.
            OSError: a checkpoint cannot be written.
        """
        self.aggregator.load(state.server)
        if self.private is not None and state.private is not None:
            self.private.load(state.private)
        with counted("rounds", self.config.rounds) as done:
            done(state.round)
            if not state.rows:
                state.rows.append({"step": 0, "round": 0, **self._seen(state.arrays)})
                keep(state)
            while state.round < self.config.rounds:
                if self.private is not None and not self.private.allows_another():
                    console.print(
                        f"privacy budget: another round would exceed it, so training ends after {state.round}"
                    )
                    break
                self._round(state)
                keep(state)
                _say(_summary(state.rows))
                done(1)
        return state

    def _round(self, state: State) -> None:
        number, started = state.round + 1, time.perf_counter()
        down, up, failures = 0, 0, list[Failure]()
        for attempt in range(self.config.attempts):
            found = self._attempt(state.arrays, number, attempt)
            down, up = down + found.bytes_down, up + found.bytes_up
            failures += found.failures
            if self.private is not None or len(found.updates) >= self.quorum:
                break
            why = listed(_told(self._named(found.failures)))
            _say(f"round {number}: {len(found.updates)} clients answered well, the quorum is {self.quorum} "
                 f"(attempt {attempt + 1} of {self.config.attempts}){why}")  # fmt: skip
        else:
            raise QuorumLost(f"round {number}: fewer than {self.quorum} of {self.config.clients_per_round} clients "
                             f"answered well in {self.config.attempts} attempts{why}: "
                             "see to the clients and go on with --resume")  # fmt: skip
        state.arrays = self._combined(state.arrays, found.updates)
        if self.own is not None:
            state.arrays = self.own(state.arrays, seed_of(self.seed, number, -1))
        state.round, state.server = number, self.aggregator.state()
        row: dict[str, Any] = {"step": number, "round": number, "clients_ok": len(found.updates),
                               "clients_failed": len(failures), "bytes_down": down, "bytes_up": up,
                               "failures": self._named(failures), "left_out": found.left_out}  # fmt: skip
        if self.private is None:
            row |= _of_clients(found.updates)
        else:  # what clients measured on their data is not covered by the noise
            state.private = self.private.state()
            row["epsilon"] = self.private.epsilon()
        row["seconds"] = time.perf_counter() - started
        if number % self.config.eval_every == 0 or number == self.config.rounds:
            row |= self._seen(state.arrays)
        state.rows.append(row)

    def _named(self, failures: Sequence[Failure]) -> list[dict[str, Any]]:
        return [asdict(each) | {"name": self.roster.plain(each.client)} for each in failures]

    def _combined(self, arrays: dict[str, Tensor], updates: list[Update]) -> dict[str, Tensor]:
        if self.private is None:
            return self.aggregator.step(arrays, updates)
        moved = self.private.average((update.delta for update in updates), arrays)
        return {name: value + moved[name] for name, value in arrays.items()}

    def _attempt(self, arrays: dict[str, Tensor], number: int, attempt: int) -> Outcome:
        asked, left_out = self._drawn(number, attempt), self.roster.rows()
        half = self.config.payload == "float16"
        sent = {name: value.half() if half else value for name, value in arrays.items()}
        jobs = Made(asked, lambda client: self._job(sent, number, client))
        answers = Answers(self.transport.exchange(jobs, self.config.timeout) if jobs else ())
        received = {name: value.float() for name, value in sent.items()}
        limits = self.aggregator.config
        if self.private is not None:  # whether one client's update counts must not depend on the others'
            limits = AggregationConfig(norm_limit=math.inf)
        updates, failures = admit(answers, received, dict.fromkeys(asked, number), self.layout, limits)
        if self.holding is not None:
            self.holding({self.roster.plain(update.client): update.data for update in updates if update.data})
        within = "" if self.config.timeout is None else f" within {self.config.timeout:g} s"
        silent = dict.fromkeys(asked, f"no answer{within}")
        silent |= answers.lost
        for client in answers.came:
            silent.pop(client, None)
        failures += [Failure(number, client, reason) for client, reason in silent.items()]
        self._heard(answers.came)
        for line in self.roster.missed(number, silent):
            _say(f"round {number}: {line}")
        return Outcome(
            updates,
            failures,
            [row for row in left_out if row["client"] not in jobs],
            jobs.size,
            answers.size,
        )

    def _drawn(self, number: int, attempt: int) -> list[int]:
        """Clients to ask; of those left out only who was heard from since, unless the others are too few."""
        self._heard(self.transport.heard(self.roster.left_out))
        there = self.roster.there
        if self.private is not None:
            members = self.roster.members
            return [members[i] for i in self.private.sample() if members[i] in there]
        if len(there) < self.quorum:
            _say(f"round {number}: clients that are not left out: {len(there)}, the quorum is {self.quorum}, so the "
                 "others may be asked too")  # fmt: skip
            there = self.roster.members
        return chosen(self.seed, number, attempt, there, self.config.clients_per_round)

    def _heard(self, clients: Iterable[int]) -> None:
        for name in self.roster.heard(clients):
            _say(f"{name} was heard from again, so it may be asked")

    def _job(self, sent: Mapping[str, Tensor], number: int, client: int) -> bytes:
        local = Local(**asdict(self.local) | {"seed": seed_of(self.seed, number, client)})
        return pack(Job(number, client, local, self.adapter, self.base, {**sent, **self.constants}))

    def _seen(self, arrays: Mapping[str, Tensor]) -> dict[str, Any]:
        found, gates = self.look(arrays)
        assert math.isfinite(found.overall)
        return {"eval_perplexity": found.overall, **found.metrics(), "gates": gates}


def _of_clients(updates: Sequence[Update]) -> dict[str, Any]:
    """What the round's clients report: loss in nats a token weighted by examples, use of experts, and drift."""
    total = sum(update.examples for update in updates)
    row: dict[str, Any] = {"loss": sum(u.loss * u.examples for u in updates) / total, "drift": drift(updates),
                           "local_seconds": sum(u.seconds for u in updates)}  # fmt: skip
    used = [(torch.tensor(u.mass, dtype=torch.float64), u.examples) for u in updates if u.mass is not None]
    if used:
        row["mass"] = (sum(mass * n for mass, n in used) / total).tolist()  # type: ignore[union-attr]
    return row


def _say(line: str) -> None:
    """To the operator, as it is."""
    console.print(line, highlight=False)


def _told(failures: Sequence[Mapping[str, Any]]) -> list[str]:
    """Who failed and why, as rows of the log keep it."""
    return [f"{each['name']!r}: {short(each['reason'])}" for each in failures]


def _summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """The last round in a line: who answered, what travelled, what came of it, and what privacy it has cost so far."""
    row, travelled = rows[-1], sum(each.get("bytes_down", 0) + each.get("bytes_up", 0) for each in rows)
    said = [f"{row['clients_ok']} answers, {row['clients_failed']} failed{listed(_told(row['failures']))}"]
    if row["left_out"]:
        since = [f"{each['name']!r} since round {each['since']}" for each in row["left_out"]]
        said.append(f"{len(since)} left out{listed(since)}")
    said.append(f"{decimal(row['bytes_down'])} sent, {decimal(row['bytes_up'])} received, {decimal(travelled)} so far")
    if "eval_perplexity" in row:
        said.append(f"perplexity {row['eval_perplexity']:.3f}")
    if "epsilon" in row:
        said.append(f"epsilon {row['epsilon']:.3f}")
    return f"round {row['round']}: " + "; ".join(said)
