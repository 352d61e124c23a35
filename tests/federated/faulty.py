"""A transport whose clients misbehave in ways of our choosing. Wraps another one; knows blobs only."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from smartmops.federated.messages import Reply, Transport, pack, unpack

Fault = Callable[[Reply], Iterable[bytes]]  # what comes instead of a good reply


def first(reply: Reply) -> str:
    return min(reply.arrays, key=lambda name: "prompts" not in name)


def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> Fault:
    """One array is no longer what it was."""
    return lambda r: [pack(replace(r, arrays=r.arrays | {first(r): change(r.arrays[first(r)].clone())}))]


def spoilt(value: float) -> Fault:
    def change(array: torch.Tensor) -> torch.Tensor:
        array.view(-1)[0] = value
        return array

    return changed(change)


def silent(reply: Reply) -> list[bytes]:
    """The client was killed in the middle of the round."""
    return []


def twice(reply: Reply) -> list[bytes]:
    """The network delivers a reply again; the second time it is changed."""
    return [pack(reply), *changed(lambda array: array + 1)(reply)]


def incomplete(reply: Reply) -> list[bytes]:
    """An expert is missing: its rows, without a word about it."""
    return list(changed(lambda array: array[: len(array) // 2])(reply))


def late(reply: Reply) -> list[bytes]:
    return [pack(replace(reply, round=reply.round - 1))]


def unnamed(reply: Reply) -> list[bytes]:
    return [pack(replace(reply, arrays={n: v for n, v in reply.arrays.items() if n != first(reply)}))]


FAULTS: dict[str, Fault] = {
    "killed": silent,
    "NaN": spoilt(float("nan")),
    "infinity": spoilt(float("inf")),
    "wrong shape": changed(lambda array: array[:, :-1]),
    "missing array": unnamed,
    "missing expert": incomplete,
    "1,000 times too large": changed(lambda array: array + 1000),
    "answer to another round": late,
    "damaged": lambda reply: [pack(reply)[:-7]],
    "answered twice": twice,
    "oversized": lambda reply: [pack(replace(reply, arrays=reply.arrays | {"more": torch.zeros(1 << 20)}))],
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

    def exchange(self, jobs: Mapping[int, bytes], timeout: float | None) -> Iterator[tuple[int, bytes]]:
        self.calls += 1
        for client, blob in self.inner.exchange(jobs, timeout):
            reply = unpack(blob)
            assert isinstance(reply, Reply), reply
            struck = random.Random(f"{self.seed} {self.calls} {client}").random() < self.probability
            if struck and (self.clients is None or client in self.clients):
                yield from ((client, each) for each in self.fault(reply))
            else:
                yield client, blob

    def close(self) -> None:
        self.inner.close()


class Straggling(Faulty):
    """Some clients take longer than the others."""

    def __init__(self, inner: Any, clients: Iterable[int], seconds: float) -> None:
        super().__init__(inner, silent, clients)
        answer = inner.worker.answer

        def slow(blob: bytes) -> bytes:
            found: bytes = answer(blob)
            reply = unpack(found)
            if isinstance(reply, Reply) and self.clients and reply.client in self.clients:
                time.sleep(seconds)
            return found

        inner.worker.answer = slow

    def exchange(self, jobs: Mapping[int, bytes], timeout: float | None) -> Iterator[tuple[int, bytes]]:
        yield from self.inner.exchange(jobs, timeout)
