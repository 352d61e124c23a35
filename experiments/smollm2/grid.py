"""Every cell of the ablation that has no result yet, by several processes at once, until the time is up. Resumable.

    python experiments/smollm2/grid.py [--workers 14] [--minutes 60] [--base smollm2] [--sets mixture paper7 dolly]

What decides comes first: the rates of every family, then three seeds of the default and of what it is compared with;
then seed 0 of all others, and their seeds in the order of their perplexity on validation data. One process serves one
data set, whose base and states its cells share.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEEDS = (1, 2)
FIRST = ("mops", "ungated", "lora rate 0.003", "mops shared half", "lora rate 0.001", "lora rate 0.01", "mops separate",
         "mops gate rate 0.03", "mops rate 0.02", "mops rate 0.06", "ungated rate 0.02", "ungated rate 0.06")  # fmt: skip
DECIDING = ("mops", "ungated", "mops shared half")  # and LoRA at the best of its rates


def cells(data: str) -> Iterator[tuple[str, int]]:
    """In order; what stands behind some of seed 0 depends on the results that are there when it is asked for."""
    from run import VARIANTS

    yield "frozen", 0
    yield from ((variant, 0) for variant in FIRST)
    ranked = by_validation(data)
    best = [name for name in ranked if name.startswith("lora")][:1]
    yield from ((variant, seed) for variant in (*DECIDING, *best) for seed in SEEDS)
    yield from ((variant, 0) for variant in VARIANTS)
    yield from ((variant, seed) for variant in ranked for seed in SEEDS)


def by_validation(data: str) -> list[str]:
    """Variants with a result of seed 0, best first."""
    found = [json.loads(file.read_text()) for file in (HERE / "results" / data).glob("*-0.json")]
    found = [one for one in found if one["variant"] != "frozen"]
    return [one["variant"] for one in sorted(found, key=lambda one: one["measured"]["validation"]["overall"])]


def claimed(data: str, variant: str, seed: int) -> bool:
    """Whether this process is the first that wants the cell."""
    file = HERE / "checkpoints" / "claims" / data / f"{variant}-{seed}"
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def work(data: str, base: str, until: float) -> None:
    """Cells of one data set that nobody else has begun, as long as another one will probably end in time."""
    import torch
    from run import Bench, file_of, run

    torch.set_num_threads(1)
    bench, longest = None, 0.0
    while (
        cell := next((c for c in cells(data) if not file_of(data, *c).exists() and claimed(data, *c)), None)
    ) is not None:
        if time.time() + longest > until:
            return
        started = time.time()
        try:
            bench = bench or Bench(data, base)
            run(bench, *cell)
        except Exception:
            print(data, *cell, "failed", traceback.format_exc(), flush=True)
            bench = None  # an adapter may still be on its base
        longest = max(longest, time.time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--sets", nargs="*", default=["mixture", "paper7", "dolly"])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        work(chosen.worker, chosen.base, chosen.until)
        return
    shutil.rmtree(HERE / "checkpoints" / "claims", ignore_errors=True)
    until = time.time() + 60 * chosen.minutes
    processes = [
        subprocess.Popen([sys.executable, __file__, "--worker", data, "--base", chosen.base, "--until", str(until)])
        for data in islice(cycle(chosen.sets), max(chosen.workers, len(chosen.sets)))
    ]
    for process in processes:
        process.wait()


if __name__ == "__main__":
    main()
