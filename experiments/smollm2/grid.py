"""Every cell of the ablation and of the questions that has no result yet, by several processes at once. Resumable.

    python experiments/smollm2/grid.py [--workers 14] [--minutes 60] [--base smollm2] [--deciding] [--sets mixture ...]

What decides comes first; then further seeds of the default and of what it is compared with; then seed 0 of all others,
and their seeds in the order of their perplexity on validation data. A process begins with one of the sets in turn (a set
named twice gets two of them), whose base and states its cells share, and goes on to the next where none is left. It
begins no cell that would probably not end within --minutes.
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
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEEDS = (1, 2)
MAIN = ("mixture", "paper7", "dolly")
DECIDING = ("mops", "ungated", "mops shared half", "lora rate 0.003", "mops separate shared half from the first layer",
            "activated lora", "one lora for each task", "oracle", "mops seen by all", "ungated seen by all",
            "mops separate seen by all from the first layer", "ungated separate seen by all from the first layer",
            "one lora for each task behind our gate", "ia3 rate 0.01", "lora in all layers")  # fmt: skip
FIRST = (
    "mops", "ungated", "lora rate 0.003", "activated lora", "mops seen by all", "mops from the first layer",
    "mops separate from the first layer", "mops separate seen by all", "mops seen by all from the first layer",
    "mops separate seen by all from the first layer", "mops separate shared half from the first layer",
    "ungated separate seen by all from the first layer", "one lora for each task behind our gate",
    "mops 30 columns", "oracle", "one lora for each task", "mops top-1", "mops linear", "mops hidden states",
    "mops gate by gradient", "mops without null", "uniform gate", "ungated seen by all", "ungated from the first layer",
    "prefix tuning rate 0.01", "ia3 rate 0.01", "input prompts rate 0.03", "nearest cluster", "mops by clusters",
    "paper's literal", "ungated separate", "mops first column frozen", "lora in all layers", "mops separate",
    "mops shared half", "mops separate seen by all from the first layer rate 0.01",
    "mops separate seen by all from the first layer rate 0.06",
)  # fmt: skip
COMPRESSED = ("mops", "ungated", "lora rate 0.003")
ASKED = ("mops", "ungated", "lora rate 0.003", "activated lora", "one lora for each task", "mops seen by all",
         "mops shared half")  # fmt: skip
LABELS = ("wrong-10", "wrong-30", "split")  # whose labels alone differ from the mixture's
GROWTH = ("mops top-2", "ungated 20 columns", "lora as 20 columns", "mops", "ungated", "lora rate 0.003")


def cells(data: str, deciding: bool = False) -> Iterator[tuple[str, int]]:
    """In order; what stands behind some of seed 0 depends on the results that are there when it is asked for.

    With `deciding`, without the variants that no page shows, and one seed of compressed bases and of answers.
    """
    from cells import FROZEN, SETS, VARIANTS

    if data in MAIN or "answers" in SETS[data]:
        yield from ((variant, 0) for variant in FROZEN)
    elif data not in LABELS:
        yield "frozen", 0
    if data in MAIN:
        yield from ((variant, 0) for variant in FIRST)
        yield from ((variant, seed) for variant in DECIDING for seed in SEEDS)
        if deciding:
            return
        yield from ((variant, 0) for variant in VARIANTS if "top-2" not in variant and " 20 columns" not in variant)
        yield from ((variant, seed) for variant in by_validation(data) for seed in SEEDS)
        return
    if data in LABELS:
        yield from ((variant, seed) for seed in (0, *SEEDS) for variant in ("mops", "one lora for each task"))
        return
    asked = GROWTH if data.startswith("growth") else ASKED if "answers" in SETS[data] else COMPRESSED
    seeds = (0,) if deciding and {"base", "answers"} & SETS[data].keys() else (0, *SEEDS)
    yield from ((variant, seed) for seed in seeds for variant in asked)


def by_validation(data: str) -> list[str]:
    """Variants with a result of seed 0, best first."""
    from cells import FROZEN

    found = [json.loads(file.read_text()) for file in (HERE / "results" / data).glob("*-0.json")]
    found = [one for one in found if one["variant"] not in FROZEN]
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


def work(sets: Sequence[str], base: str, until: float, deciding: bool) -> None:
    """Cells that nobody else has begun, of one data set after another."""
    from run import base_of

    for data in sets:
        if isinstance(own := base_of(data, base), Path) and not own.exists():
            print(f"{data}: there is no {own}; `run.py bases TEXT` makes it", flush=True)
            continue
        work_on(data, base, until, deciding)


def work_on(data: str, base: str, until: float, deciding: bool) -> None:
    """Cells of one data set that nobody else has begun, as long as another one will probably end in time."""
    import torch
    from run import Bench, file_of, run

    torch.set_num_threads(1)
    bench, longest = None, 0.0
    while (
        cell := next((c for c in cells(data, deciding) if not file_of(data, *c).exists() and claimed(data, *c)), None)
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
    parser.add_argument("--deciding", action="store_true", help="leave out what no page shows")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        first = chosen.sets.index(chosen.worker)
        work([*chosen.sets[first:], *chosen.sets[:first]], chosen.base, chosen.until, chosen.deciding)
        return
    shutil.rmtree(HERE / "checkpoints" / "claims", ignore_errors=True)
    until = time.time() + 60 * chosen.minutes
    own = [
        sys.executable,
        __file__,
        "--base",
        chosen.base,
        "--until",
        str(until),
        *(["--deciding"] if chosen.deciding else []),
        "--sets",
        *dict.fromkeys(chosen.sets),
    ]
    first = islice(cycle(chosen.sets), chosen.workers)
    processes = [subprocess.Popen([*own, "--worker", data]) for data in first]
    for process in processes:
        process.wait()


if __name__ == "__main__":
    main()
