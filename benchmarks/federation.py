"""What a federation in one process costs: rounds a second, memory and bytes over the number of clients, and its overhead.

    python benchmarks/federation.py measure          each number of clients in a process of its own -> federation.json
    python benchmarks/federation.py measure small    the same on a small setting, in seconds, to see that it works
    python benchmarks/federation.py page             federation.md from federation.json

The embedded base; made-up examples, the same number whatever the number of clients. The overhead is what a round takes
beyond its clients' training: messages, checks, averaging, checkpoint and log; evaluation is apart. It is measured twice:
by the clocks of the round itself, and against the same steps made once more without a federation around them, in turns
with the rounds. The second way would also show a federation that slows training itself, but it is noisier.
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CLIENTS, TARGET = (10, 100, 1_000, 10_000), 0.05
FULL = {"examples": 20_000, "rounds": 6, "local_steps": 20, "clients_per_round": 10}
SMALL = {"examples": 20_000, "rounds": 3, "local_steps": 4, "clients_per_round": 10}
WORDS = ("the", "answer", "of", "this", "question", "is", "a", "name", "for", "some", "text", "about", "sound", "and", "stone",
         "in", "reply", "to", "it")  # fmt: skip


class Watch:
    """Hears of every round's jobs and of its checkpoint; then trains the same once more, alone."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.jobs: dict[int, bytes] = {}
        self.worker: Any = None
        self.began = 0.0

    def kept(self, row: dict[str, Any]) -> None:
        """The round's last deed is done: it has logged this row."""
        ended = time.perf_counter()
        if self.jobs:
            self.rows.append({"round": ended - self.began, "inside": row["local_seconds"], "pure": self.pure()})
            self.jobs = {}
        self.began = time.perf_counter()

    def pure(self) -> float:
        """Seconds of the same clients' steps without messages."""
        from smartmops.clients.messages import unpack
        from smartmops.federated.client import train_locally

        work = [(self.worker.holdings[client], unpack(blob).local) for client, blob in self.jobs.items()]
        held = self.worker._held
        began = time.perf_counter()
        for holding, local in work:
            train_locally(held.model, held.batch, holding, local)
        return time.perf_counter() - began


def watched(watch: Watch) -> None:
    """Put the watch around transport and log of the run to come."""
    from smartmops.federated import federate as module
    from smartmops.runs.folder import Run

    exchange, append = module.InProcess.exchange, Run.append_curve

    def overheard(self: Any, jobs: dict[int, bytes], timeout: float | None) -> Iterator[tuple[int, bytes]]:
        watch.jobs, watch.worker = jobs, self.worker
        yield from exchange(self, jobs, timeout)

    def appended(self: Run, row: dict[str, Any]) -> None:
        append(self, row)  # the last thing that a round does, after its checkpoint
        watch.kept(row)

    module.InProcess.exchange = overheard  # type: ignore[method-assign]
    Run.append_curve = appended  # type: ignore[method-assign,assignment]


def examples(file: Path, count: int, clients: int) -> None:
    draw = random.Random(0)
    with open(file, "w") as out:
        for i in range(count):
            row = {"instruction": " ".join(draw.choices(WORDS, k=8)), "response": " ".join(draw.choices(WORDS, k=4)),
                   "category": f"task {i % 7}", "source": f"client {i % clients:05}"}  # fmt: skip
            out.write(json.dumps(row) + "\n")


def one(clients: int, setting: dict[str, int]) -> dict[str, Any]:
    """One federation in this process."""
    import torch

    from smartmops.federated.federate import FederateConfig, federate

    load, watch = os.getloadavg(), Watch()
    watched(watch)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "made_up.jsonl"
        examples(file, setting["examples"], clients)
        metrics = federate(FederateConfig(
            model="tiny", data=str(file), out=Path(folder) / "run", partition="source", clients=clients,
            rounds=setting["rounds"], clients_per_round=setting["clients_per_round"], local_steps=setting["local_steps"],
            test_share=0.005, eval_every=setting["rounds"], samples_per_task=0,
        ))  # fmt: skip
    timed = watch.rows[1:-1]  # the first round warms up, the last one ends with an evaluation
    assert len(watch.rows) == setting["rounds"] and timed
    return {
        "clients": clients,
        "seconds_per_round": statistics.median(row["round"] for row in timed),
        "local_seconds_per_round": statistics.median(row["inside"] for row in timed),
        "pure_seconds_per_round": statistics.median(row["pure"] for row in timed),
        "overheads": [row["round"] / row["inside"] - 1 for row in timed],
        "overheads_apart": [row["round"] / row["pure"] - 1 for row in timed],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "bytes_down_per_round": metrics["bytes_down"] / setting["rounds"],
        "bytes_up_per_round": metrics["bytes_up"] / setting["rounds"],
        "threads": torch.get_num_threads(),
        "load": load,
    }


def measure(setting: dict[str, int]) -> dict[str, Any]:
    load, found = os.getloadavg(), []
    for clients in CLIENTS:
        done = subprocess.run(
            [sys.executable, __file__, "one", str(clients), json.dumps(setting)],
            check=True,
            capture_output=True,
            text=True,
        )
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(found[-1], flush=True)
    return {"setting": setting, "cores": os.cpu_count(), "load": load, "points": found}


# ---------------------------------------------------------------------------------------------------------------- page
def lines(found: dict[str, Any]) -> Iterator[str]:
    s, points = found["setting"], found["points"]
    yield "# A federation in one process\n"
    yield "Written by `python benchmarks/federation.py page` from `federation.json`.\n"
    yield (f"The embedded base, {s['examples']:,} made-up examples whatever the number of clients, {s['clients_per_round']} "
           f"clients a round, {s['local_steps']} local steps of one example. A round is everything from its draw of clients to "
           "its line in the log, checkpoint included; evaluation is apart. The overhead is what it takes beyond its clients' "
           "training: by the clocks of the round itself, and against the same clients making the same steps once more without "
           "a federation around them, after every round. The second would also show a federation that slows training itself, "
           f"but is noisier. Medians of {len(points[0]['overheads'])} rounds (lowest and highest in brackets), the "
           "first and the last left out; each number of clients in a process of its own.\n")  # fmt: skip
    loads = ", ".join(f"{p['load'][0]:.1f}" for p in points)
    threads = points[0]["threads"]
    yield (f"{found['cores']} cores, {threads} thread{'s' * (threads > 1)} of torch's. Load average of the machine over the "
           f"minute before: {found['load'][0]:.1f} at the start, {loads} when each number of clients began. A load above the "
           "number of threads means that something else was running: then seconds are longer than on a machine at rest, and "
           "they scatter.\n")  # fmt: skip
    yield ("| clients | rounds/s | s a round | s of local training in it | s of the same steps apart | overhead by the round's "
           "clocks | overhead against the steps apart | peak memory, MiB | kB down a round | kB up a round |")  # fmt: skip
    yield "|---" * 10 + "|"
    for p in points:
        yield (f"| {p['clients']:,} | {1 / p['seconds_per_round']:.3f} | {p['seconds_per_round']:.2f} | "
               f"{p['local_seconds_per_round']:.2f} | {p['pure_seconds_per_round']:.2f} | {percent(p['overheads'])} | "
               f"{percent(p['overheads_apart'])} | {p['peak_mib']:.0f} | {p['bytes_down_per_round'] / 1e3:.0f} | "
               f"{p['bytes_up_per_round'] / 1e3:.0f} |")  # fmt: skip
    yield ""
    yield from verdict(points)


def percent(values: list[float]) -> str:
    return f"{100 * statistics.median(values):+.1f} % ({100 * min(values):+.1f} to {100 * max(values):+.1f})"


def verdict(points: list[dict[str, Any]]) -> Iterator[str]:
    yield f"Target: an overhead of at most {100 * TARGET:g} % (medians).\n"
    for key, how in (("overheads", "By the round's clocks"), ("overheads_apart", "Against the steps made apart")):
        missed = [f"{p['clients']:,}" for p in points if statistics.median(p[key]) > TARGET]
        yield f"- {how}: " + (f"**not reached** at {', '.join(missed)} clients." if missed else "met at every number.")
    first, last = points[0], points[-1]
    most = max(p["peak_mib"] for p in points) / min(p["peak_mib"] for p in points) - 1
    yield (f"\nMemory from {first['clients']:,} to {last['clients']:,} clients: "
           f"{100 * (last['peak_mib'] / first['peak_mib'] - 1):+.1f} %; the highest of the four peaks is {100 * most:.1f} % above the "
           "lowest.")  # fmt: skip


if __name__ == "__main__":
    command = sys.argv[1:]
    if command[:1] == ["one"]:
        print(json.dumps(one(int(command[1]), json.loads(command[2]))))
    elif command == ["measure", "small"]:
        print("\n".join(lines(measure(SMALL))))
    elif command == ["measure"]:
        (HERE / "federation.json").write_text(json.dumps(measure(FULL), indent=1) + "\n")
    elif command == ["page"]:
        (HERE / "federation.md").write_text("\n".join(lines(json.loads((HERE / "federation.json").read_text()))) + "\n")
    else:
        sys.exit(__doc__)
