"""Clients whose data stay apart train one adapter, in one process; two ways to average are compared.

python examples/federate.py --model smollm2 --clients 3 --rounds 5
"""

from __future__ import annotations

import argparse
from pathlib import Path

import smartmops as sm

DATA = Path(__file__).parent / "data/support.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a folder, a hub id, a *.gguf file, smollm2 or tiny")
    parser.add_argument("--data", default=str(DATA), help="what is dealt out to the clients")
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--local-steps", type=int, default=10, help="optimiser steps of a client in a round")
    parser.add_argument("--out", default="runs/federated", help="folder of the two runs")
    given = parser.parse_args()

    tasks = {example.category for example in sm.read(given.data)}
    for aggregation in ("fedavg", "expert-weighted"):
        found = sm.federate(
            model=given.model,
            data=given.data,
            out=f"{given.out}/{aggregation}",
            experts=len(tasks),
            clients=given.clients,
            clients_per_round=given.clients,
            rounds=given.rounds,
            local_steps=given.local_steps,
            partition="dirichlet",  # each client has mostly some of the tasks
            dirichlet_alpha=1.0,
            skip_empty=True,
            batch_size=4,
            aggregation=aggregation,
        )
        print(f"{aggregation}: perplexity {found['perplexity_frozen']['overall']:.2f} frozen, "
              f"{found['perplexity']['overall']:.2f} after {len(found['rounds'])} rounds; "
              f"{(found['bytes_up'] + found['bytes_down']) / 1e6:.1f} MB sent")  # fmt: skip


if __name__ == "__main__":
    main()
