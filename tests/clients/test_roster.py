"""A client of whom nothing comes: named, left out until it is heard from again, and asked after all where the others are too few."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from smartmops.checks.errors import QuorumLost
from smartmops.clients.messages import Failure, Job, Local, Lost, Reply, pack, unpack
from smartmops.clients.roster import LONGEST, Roster, listed, short
from smartmops.evaluation.perplexity import Evaluation
from smartmops.federated.aggregation import Aggregator, Layout
from smartmops.federated.rounds import Server, State
from smartmops.options.federation import AggregationConfig, RoundsConfig

NAMES = {0: "berlin", 1: "new [york]", 2: "paris"}


class Scripted:
    """Clients that answer at once, but those that are dead: of them nothing comes, or what Flower says of them."""

    def __init__(self, dead: Mapping[int, Iterable[int]], reason: str | None) -> None:
        self.dead, self.reason = {client: set(rounds) for client, rounds in dead.items()}, reason
        self.asked: list[list[int]] = []
        self.called: list[set[int]] = []
        self.round = 0

    def hello(self) -> dict[int, bytes]:
        return {}

    def exchange(self, jobs: Mapping[int, bytes], timeout: float | None) -> Iterator[tuple[int, bytes | Lost]]:
        self.asked.append(list(jobs))
        for client, blob in jobs.items():
            job = unpack(blob)
            assert isinstance(job, Job)
            self.round = job.round
            if job.round not in self.dead.get(client, ()):
                arrays = {name: value + 1 for name, value in job.arrays.items()}
                yield client, pack(Reply(job.round, client, 5, 1.0, 0.0, None, None, False, arrays))
            elif self.reason is not None:
                yield client, Lost(self.reason)

    def heard(self, clients: Iterable[int]) -> set[int]:
        self.called.append(set(clients))
        return {client for client in clients if self.round + 1 not in self.dead.get(client, ())}

    def refuse(self, reasons: Mapping[int, str]) -> None: ...

    def close(self) -> None: ...


def server(transport: Any, **changes: Any) -> Server:
    given: dict[str, Any] = {"clients_per_round": 3, "rounds": 4, "local_steps": 1, "timeout": 9.0}
    layout = Layout()

    def look(arrays: Mapping[str, Tensor]) -> tuple[Evaluation, dict[str, Any]]:
        return Evaluation(2.0, {"a": 2.0}, {"a": 1}), {}

    return Server(RoundsConfig(**given | changes), 0, Local(1, 1, 0.1, 0.1, 0), {}, "base", {}, Roster(NAMES), layout,
                  Aggregator(AggregationConfig(), layout), transport, look)  # fmt: skip


def run(transport: Any, **changes: Any) -> list[dict[str, Any]]:
    return server(transport, **changes).run(State(0, {"w": torch.zeros(2)}), lambda state: None).rows[1:]


@pytest.mark.parametrize(("reason", "said"), [(None, "no answer within 9 s"), ("Flower: gone", "Flower: gone")])
def test_who_is_dead_is_asked_once_and_then_once_it_is_heard_from(
    reason: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    transport = Scripted({1: (2, 3)}, reason)
    rows = run(transport)
    assert transport.asked == [[0, 1, 2], [0, 1, 2], [0, 2], [0, 1, 2]]
    assert transport.called == [set(), set(), {1}, {1}]
    assert [(row["clients_ok"], row["clients_failed"]) for row in rows] == [(3, 0), (2, 1), (2, 0), (3, 0)]
    assert rows[1]["failures"] == [{"round": 2, "client": 1, "name": "new [york]", "reason": said}]
    left_out = {"client": 1, "name": "new [york]", "since": 2, "reason": said}
    assert [row["left_out"] for row in rows] == [[], [], [left_out], []]
    told = " ".join(capsys.readouterr().out.split())
    assert f"round 2: 'new [york]' is left out until it is heard from again: {said}" in told
    assert f"round 2: 2 answers, 1 failed ('new [york]': {said});" in told
    assert "round 3: 2 answers, 0 failed; 1 left out ('new [york]' since round 2);" in told
    assert told.count("'new [york]' was heard from again") == 1


def test_who_answers_badly_is_there_and_is_asked_again() -> None:
    class Failing(Scripted):
        def exchange(self, jobs: Mapping[int, bytes], timeout: float | None) -> Iterator[tuple[int, bytes | Lost]]:
            for client, blob in super().exchange(jobs, timeout):
                yield client, pack(Failure(0, client, "disk full")) if client == 2 else blob

    transport = Failing({}, None)
    rows = run(transport)
    assert transport.asked == [[0, 1, 2]] * 4
    assert [(f["name"], f["reason"]) for row in rows for f in row["failures"]] == [("paris", "disk full")] * 4


def test_the_server_is_told_round_by_round_what_tells_a_clients_data() -> None:
    class Restarted(Scripted):
        """Client 2 comes back in round 3 and holds something else."""

        def exchange(self, jobs: Mapping[int, bytes], timeout: float | None) -> Iterator[tuple[int, bytes | Lost]]:
            for client, blob in super().exchange(jobs, timeout):
                assert isinstance(blob, bytes)
                found = unpack(blob)
                assert isinstance(found, Reply)
                yield client, pack(replace(found, data=f"{client} {found.round >= 3 and client == 2}"))

    told: list[Mapping[str, str]] = []
    made = replace(server(Restarted({}, None)), holding=told.append)
    made.run(State(0, {"w": torch.zeros(2)}), lambda state: None)
    before, after = ({"berlin": "0 False", "new [york]": "1 False", "paris": f"2 {there}"} for there in (False, True))
    assert told == [before, before, after, after]


def test_where_the_others_are_too_few_who_was_left_out_is_asked_after_all(capsys: pytest.CaptureFixture[str]) -> None:
    class Mute(Scripted):
        """Whoever comes back says so by its next answer alone."""

        def heard(self, clients: Iterable[int]) -> set[int]:
            return set()

    transport = Mute({1: (1,), 2: (1,)}, None)
    lost = r"2 of 3 clients answered well in 2 attempts \('new \[york\]': no answer within 9 s; 'paris': no answer"
    with pytest.raises(QuorumLost, match=lost):
        run(transport, quorum=2, attempts=2)
    assert transport.asked == [[0, 1, 2], [0, 1, 2]]
    assert "clients that are not left out: 1, the quorum is 2" in " ".join(capsys.readouterr().out.split())
    transport = Mute({1: (1,), 2: (1, 2)}, None)
    rows = run(transport, quorum=1)
    assert transport.asked == [[0, 1, 2], [0], [0], [0]] and len(rows[-1]["left_out"]) == 2
    transport = Mute({1: (1,), 2: (2,)}, None)
    rows = run(transport, quorum=2)
    assert transport.asked == [[0, 1, 2], [0, 2], [0, 1, 2], [0, 1], [0, 1]]
    assert [[each["name"] for each in row["left_out"]] for row in rows] == [[], [], ["paris"], ["paris"]]


def test_nobody_dead_means_the_same_draws_as_ever() -> None:
    both = [Scripted({}, None), Scripted({2: (4,)}, None)]  # 2 dies in the last round
    for transport in both:
        run(transport, clients_per_round=2, attempts=1, quorum=1)
    assert both[0].asked == both[1].asked and len(set(map(tuple, both[0].asked))) > 1


def test_a_line_names_a_few_and_counts_the_others() -> None:
    assert (listed([]), listed(["a"]), listed(["a", "b", "c"])) == ("", " (a)", " (a; b; c)")
    assert listed(["a", "b", "c", "d", "e"]) == " (a; b; c; and 2 more)"


def test_a_reason_is_one_line_of_bounded_length_without_control_characters() -> None:
    draw = random.Random(0)
    assert short("two\nlines \x1b[31m\tred") == "two lines ?[31m red"
    assert len(short("".join(chr(draw.randrange(1, 0x3000)) for _ in range(10_000)))) <= LONGEST + 3
