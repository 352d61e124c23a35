"""What a server of a federation takes where all clients act in every round: memory, seconds and bytes over their number.

    python benchmarks/messages.py measure          each number of clients in a process of its own -> messages.json
    python benchmarks/messages.py measure small    fewer clients, in seconds, to see that it works
    python benchmarks/messages.py page             messages.md and messages.png from messages.json

Messages alone: nobody trains. A client unpacks its job, adds noise of its own to the arrays, and answers with a packed
reply, as a trained one would; the server draws, sends, checks, averages, and writes its checkpoint as it always does.
With `measure ray`, some of the numbers are measured once more with real training in Flower's simulation on Ray.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CLIENTS, SMALL, ROUNDS = (10, 100, 1_000, 10_000), (10, 100), 3
EXPERTS, PROMPTS, WIDTH, INNER = 7, 10, 512, 64  # the arrays of an adapter of hidden states
PLAIN = ("fedavg", "trimmed-mean")


class Noisy:
    """A transport whose clients answer with what they were sent, and noise by their number."""

    def __init__(self, clients: int) -> None:
        self.clients, self.answered = clients, 0.0

    def hello(self) -> dict[int, bytes]:
        return {}

    def exchange(self, jobs: Mapping[int, bytes], timeout: float | None) -> Iterable[tuple[int, bytes]]:
        for client, blob in jobs.items():
            began = time.perf_counter()
            answer = self._answer(blob)
            self.answered += time.perf_counter() - began
            yield client, answer

    def _answer(self, blob: bytes) -> bytes:
        import torch

        from smartmops.clients.messages import Job, Reply, pack, unpack

        job = unpack(blob)
        assert isinstance(job, Job)
        noise = torch.Generator().manual_seed(job.local.seed)
        arrays = {name: value + 0.01 * torch.randn(value.shape, generator=noise) for name, value in job.arrays.items()}
        mass = [1 / EXPERTS] * EXPERTS
        return pack(Reply(job.round, job.client, 1 + job.client % 9, 1.0, 0.0, mass, None, False, arrays))

    def heard(self, clients: Iterable[int]) -> set[int]:
        return set(clients)

    def close(self) -> None:
        pass


def one(clients: int, aggregation: str) -> dict[str, Any]:
    """Some rounds in this process; the first warms up."""
    import torch

    from smartmops.clients.messages import Local
    from smartmops.clients.roster import Roster
    from smartmops.evaluation.perplexity import Evaluation
    from smartmops.federated.aggregation import Aggregator, Layout
    from smartmops.federated.rounds import Server, State
    from smartmops.options.federation import AggregationConfig, RoundsConfig

    torch.set_num_threads(1)
    shapes = {"gate_in": (INNER, WIDTH), "gate_out": (EXPERTS, INNER), "prompts": (EXPERTS * PROMPTS, WIDTH)}
    arrays = {name: torch.randn(shape) for name, shape in shapes.items()}
    layout = Layout(EXPERTS, frozenset({"prompts"}))
    transport = Noisy(clients)
    seen = Evaluation.of({"all": 1.0}, {"all": 1})
    server = Server(
        config=RoundsConfig(rounds=ROUNDS, clients_per_round=clients), seed=0, local=Local(1, 1, 0.1, 0.1, 0),
        adapter={}, base="", constants={}, roster=Roster({i: f"client {i}" for i in range(clients)}), layout=layout,
        aggregator=Aggregator(AggregationConfig(aggregation=aggregation), layout), transport=transport,  # type: ignore[arg-type]
        look=lambda arrays: (seen, {}),
    )  # fmt: skip
    ends: list[tuple[float, float]] = []
    before = _peak()
    with tempfile.TemporaryDirectory() as folder:

        def keep(state: State) -> None:
            state.save(Path(folder) / "round.safetensors")
            ends.append((time.perf_counter(), transport.answered))

        state = server.run(State(0, arrays), keep)
    (began, idle), (ended, busy) = ends[1], ends[-1]
    rounds = len(ends) - 2
    return {
        "clients": clients, "aggregation": aggregation, "seconds_per_round": (ended - began) / rounds,
        "of_clients": (busy - idle) / rounds, "peak_mib": _peak(), "idle_mib": before,
        "bytes_down": state.rows[-1]["bytes_down"], "bytes_up": state.rows[-1]["bytes_up"],
        "clients_ok": state.rows[-1]["clients_ok"], "load": os.getloadavg(),
    }  # fmt: skip


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(numbers: Iterable[int]) -> dict[str, Any]:
    found = []
    for aggregation in PLAIN:
        for clients in numbers:
            command = [sys.executable, __file__, "one", str(clients), aggregation]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(found[-1], flush=True)
    return {"cores": os.cpu_count(), "points": found}


if __name__ == "__main__":
    command = sys.argv[1:]
    if command[:1] == ["one"]:
        print(json.dumps(one(int(command[1]), command[2])))
    elif command == ["measure", "small"]:
        measure(SMALL)
