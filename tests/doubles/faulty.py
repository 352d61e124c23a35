"""Clients that misbehave in ways of our choosing, and a server that meets its end at a moment of our choosing."""

from __future__ import annotations

import errno
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from smartmops.clients.messages import Job, Lost, Reply, Transport, pack, unpack
from smartmops.federated import rounds
from smartmops.federated.federate import InProcess
from smartmops.federated.rounds import State

Fault = Callable[[Reply, Job], Iterable[bytes]]  # what comes instead of a good reply


def first(reply: Reply) -> str:
    return min(reply.arrays, key=lambda name: "prompts" not in name)


def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> Fault:
    """One array is no longer what it was."""
    return lambda r, _: [pack(replace(r, arrays=r.arrays | {first(r): change(r.arrays[first(r)].clone())}))]


def spoilt(value: float) -> Fault:
    def change(array: torch.Tensor) -> torch.Tensor:
        array.view(-1)[0] = value
        return array

    return changed(change)


def silent(reply: Reply, job: Job) -> list[bytes]:
    """The client was killed in the middle of the round."""
    return []


def twice(reply: Reply, job: Job) -> list[bytes]:
    """The network delivers a reply again; the second time it is changed."""
    return [pack(reply), *changed(lambda array: array + 1)(reply, job)]


def incomplete(reply: Reply, job: Job) -> list[bytes]:
    """An expert is missing: its rows, without a word about it."""
    return list(changed(lambda array: array[: len(array) // 2])(reply, job))


def late(reply: Reply, job: Job) -> list[bytes]:
    return [pack(replace(reply, round=reply.round - 1))]


def unnamed(reply: Reply, job: Job) -> list[bytes]:
    return [pack(replace(reply, arrays={n: v for n, v in reply.arrays.items() if n != first(reply)}))]


def magnified(reply: Reply, job: Job) -> list[bytes]:
    """The honest update, 1,000 times."""
    return [
        pack(replace(reply, arrays={n: job.arrays[n] + 1000 * (v - job.arrays[n]) for n, v in reply.arrays.items()}))
    ]


FAULTS: dict[str, Fault] = {
    "killed": silent,
    "NaN": spoilt(float("nan")),
    "infinity": spoilt(float("inf")),
    "wrong shape": changed(lambda array: array[:, :-1]),
    "missing array": unnamed,
    "missing expert": incomplete,
    "1,000 times too large": magnified,
    "answer to another round": late,
    "damaged": lambda reply, _: [pack(reply)[:-7]],
    "answered twice": twice,
    "oversized": lambda reply, _: [pack(replace(reply, arrays=reply.arrays | {"more": torch.zeros(1 << 20)}))],
}


class Faulty:
    """`fault` befalls the replies of some clients, always, or at random with the given probability."""

    def __init__(
        self, inner: Transport, fault: Fault, clients: Iterable[int] | None = None, probability: float = 1.0, seed: int = 0
    ) -> None:  # fmt: skip
        self.inner, self.fault, self.probability = inner, fault, probability
        self.clients = None if clients is None else set(clients)
        self.seed, self.calls = seed, 0

    def hello(self) -> dict[int, bytes]:
        return self.inner.hello()

    def exchange(self, jobs: Mapping[int, bytes], timeout: float | None) -> Iterator[tuple[int, bytes | Lost]]:
        self.calls += 1
        for client, blob in self.inner.exchange(jobs, timeout):
            assert isinstance(blob, bytes)
            reply, job = unpack(blob), unpack(jobs[client])
            assert isinstance(reply, Reply) and isinstance(job, Job), reply
            hit = random.Random(f"{self.seed} {self.calls} {client}").random() < self.probability
            if hit and (self.clients is None or client in self.clients):
                yield from ((client, each) for each in self.fault(reply, job))
            else:
                yield client, blob

    def heard(self, clients: Iterable[int]) -> set[int]:
        return self.inner.heard(clients)

    def refuse(self, reasons: Mapping[int, str]) -> None:
        self.inner.refuse(reasons)

    def close(self) -> None:
        self.inner.close()


class Straggling(Faulty):
    """Some clients take longer than the others, and so come last, as they would where all train at once.

    By a clock of our own: the others take no time at all, whatever else this machine does.
    """

    def __init__(self, inner: Any, clients: Iterable[int], seconds: float) -> None:
        super().__init__(inner, silent, clients)
        answer, self.now = inner.worker.answer, 0.0
        inner.clock = lambda: self.now

        def slow(blob: bytes) -> bytes:
            found: bytes = answer(blob)
            reply = unpack(found)
            if isinstance(reply, Reply) and self.clients and reply.client in self.clients:
                self.now += seconds
            return found

        inner.worker.answer = slow

    def exchange(self, jobs: Mapping[int, bytes], timeout: float | None) -> Iterator[tuple[int, bytes | Lost]]:
        slow = self.clients or set()
        yield from self.inner.exchange({c: jobs[c] for c in sorted(jobs, key=lambda c: (c in slow, c))}, timeout)


# ------------------------------------------------------------------------------------------------------------ the server
@contextmanager
def struck(moment: str, number: int, strike: Callable[[], Any]) -> Iterator[None]:
    """`strike` comes in a round: once one client has answered, with half of the checkpoint written, or with all of it."""
    exchange, save, save_file = InProcess.exchange, State.save, rounds.save_file

    def within_a_round(
        self: InProcess, jobs: Mapping[int, bytes], timeout: float | None
    ) -> Iterator[tuple[int, bytes]]:
        for client, blob in exchange(self, jobs, timeout):
            yield client, blob
            job = unpack(jobs[client])
            if isinstance(job, Job) and job.round == number:
                strike()

    def within_a_checkpoint(tensors: Any, file: Path, words: Mapping[str, str]) -> None:
        if json.loads(words["state"])["round"] == number:
            file.write_bytes(b"half of it")
            strike()
        save_file(tensors, file, words)

    def between_rounds(self: State, file: Path) -> None:
        save(self, file)
        if self.round == number:
            strike()

    with {
        "within a round": patch.object(InProcess, "exchange", within_a_round),
        "within a checkpoint": patch.object(rounds, "save_file", within_a_checkpoint),
        "between rounds": patch.object(State, "save", between_rounds),
    }[moment]:
        yield


def full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
