"""What a federation in one process costs: rounds a second, memory and bytes over the number of clients, and its overhead.

    python benchmarks/federation.py measure     each number of clients in a process of its own -> federation.json
    python benchmarks/federation.py page        federation.md from federation.json

The embedded base; made-up examples, the same number whatever the number of clients; 10 clients a round. The overhead is
what a round takes beyond its clients' local training: messages, checks, averaging, the checkpoint; evaluation is apart.
"""

from __future__ import annotations

import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CLIENTS = (10, 100, 1_000, 10_000)
EXAMPLES, ROUNDS, STEPS = 20_000, 8, 50


def one(clients: int) -> dict[str, Any]:
    """One federation in this process."""
    from smartmops.federated.federate import FederateConfig, federate

    draw = random.Random(0)
    words = ["the", "answer", "of", "this", "question", "is", "a", "name", "for", "some", "text", "about", "sound", "and", "stone", "in", "reply", "to", "it"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "made_up.jsonl"
        with open(file, "w") as out:
            for i in range(EXAMPLES):
                row = {"instruction": " ".join(draw.choices(words, k=8)), "response": " ".join(draw.choices(words, k=4)),
                       "category": f"task {i % 7}", "source": f"client {i % clients:05}"}  # fmt: skip
                out.write(json.dumps(row) + "\n")
        metrics = federate(FederateConfig(
            model="tiny", data=str(file), out=Path(folder) / "run", partition="source", clients=clients, rounds=ROUNDS,
            clients_per_round=10, local_steps=STEPS, test_share=0.005, eval_every=ROUNDS, samples_per_task=0,
        ))  # fmt: skip
        rows = [json.loads(line) for line in (Path(folder) / "run" / "curves.jsonl").read_text().splitlines()][1:]
    timed = rows[1:]  # the first round warms up
    return {
        "clients": clients,
        "seconds_per_round": statistics.median(row["seconds"] for row in timed),
        "local_seconds_per_round": statistics.median(row["local_seconds"] for row in timed),
        "overhead": statistics.median(row["seconds"] / row["local_seconds"] - 1 for row in timed),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "bytes_down_per_round": metrics["bytes_down"] / ROUNDS,
        "bytes_up_per_round": metrics["bytes_up"] / ROUNDS,
    }


def measure() -> None:
    found = []
    for clients in CLIENTS:
        done = subprocess.run(
            [sys.executable, __file__, "one", str(clients)], check=True, capture_output=True, text=True
        )
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(found[-1], flush=True)
    setting = {"examples": EXAMPLES, "rounds": ROUNDS, "local_steps": STEPS, "clients_per_round": 10}
    (HERE / "federation.json").write_text(json.dumps({"setting": setting, "points": found}, indent=1) + "\n")


def page() -> None:
    found = json.loads((HERE / "federation.json").read_text())
    s = found["setting"]
    lines = [
        "# A federation in one process\n",
        "Written by `python benchmarks/federation.py page` from `federation.json`.\n",
        f"The embedded base, {s['examples']:,} made-up examples whatever the number of clients, {s['clients_per_round']} "
        f"clients a round, {s['local_steps']} local steps of one example; medians of {s['rounds'] - 1} rounds after a first one. "
        "Each number of clients in a process of its own. Evaluation is not counted.\n",
        "| clients | rounds/s | s a round | of it local training | overhead over local training | peak memory, MiB | kB down a "
        "round | kB up a round |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in found["points"]:
        lines.append(
            f"| {p['clients']:,} | {1 / p['seconds_per_round']:.2f} | {p['seconds_per_round']:.3f} | "
            f"{p['local_seconds_per_round']:.3f} | {100 * p['overhead']:.1f} % | {p['peak_mib']:.0f} | "
            f"{p['bytes_down_per_round'] / 1e3:.0f} | {p['bytes_up_per_round'] / 1e3:.0f} |"
        )
    (HERE / "federation.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "one":
        print(json.dumps(one(int(sys.argv[2]))))
    elif command in ("measure", "page"):
        {"measure": measure, "page": page}[command]()
    else:
        sys.exit(__doc__)
