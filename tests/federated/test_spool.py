"""What a server holds of a round does not grow with the clients that act in it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from smartmops.clients.messages import Made, Reply, pack
from smartmops.federated import spool
from smartmops.federated.aggregation import COMPARED, Layout, admit, drift
from smartmops.federated.spool import Spool
from smartmops.options.federation import AggregationConfig

SENT = {"prompts": torch.zeros(4, 3)}


def answer(client: int) -> bytes:
    arrays = {"prompts": torch.full((4, 3), float(client + 1))}
    return pack(Reply(1, client, 1, 0.5, 0.1, None, None, False, arrays))


@pytest.mark.parametrize("at_hand", [1, 2**26], ids=["on-disk", "in-memory"])
def test_blobs_come_back_as_they_were_in_any_order(at_hand: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "AT_HAND", at_hand)
    kept, blobs = Spool(), [bytes([i]) * i for i in range(5)]
    places = [kept.put(blob) for blob in blobs]
    assert [kept.get(place) for place in reversed(places)] == blobs[::-1]
    assert kept.get(kept.put(b"later")) == b"later" and kept.get(places[3]) == blobs[3]


def test_jobs_are_made_one_at_a_time_and_counted_once() -> None:
    made: list[int] = []
    jobs = Made([3, 1], lambda number: made.append(number) or bytes(number))  # type: ignore[func-returns-value]
    assert list(jobs) == [3, 1] and len(jobs) == 2 and 1 in jobs and made == [] and jobs.size == 0
    assert dict(jobs) == {3: bytes(3), 1: bytes(1)} and jobs[3] == bytes(3)
    assert made == [3, 1, 3] and jobs.size == 4
    with pytest.raises(KeyError):
        jobs[2]


def test_no_array_of_an_admitted_answer_stays_in_memory() -> None:
    (update,), failures = admit([(0, answer(0))], SENT, {0: 1}, Layout(), AggregationConfig())
    first = update.delta["prompts"]
    seen = weakref.ref(first)
    assert failures == [] and torch.equal(first, torch.ones(4, 3, dtype=torch.float64))
    del first
    gc.collect()
    assert seen() is None and torch.equal(update.delta["prompts"], torch.ones(4, 3, dtype=torch.float64))


def test_of_many_clients_some_are_compared_evenly_spread() -> None:
    count = 2 * COMPARED
    config = AggregationConfig(norm_limit=1e9)
    updates, _ = admit([(i, answer(i)) for i in range(count)], SENT, dict.fromkeys(range(count), 1), Layout(), config)
    assert len(updates) == count and drift(updates) == drift(updates[::2])
