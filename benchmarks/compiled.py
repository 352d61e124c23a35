"""Whether `torch.compile` helps the upper half: steps of the same batches, plain against compiled decoder layers.

    python benchmarks/compiled.py [DATA]      writes compiled.json and compiled.md beside itself

The shape, the batches and the cache are those of `smartmops bench`. Layers are compiled in place, with dynamic shapes,
since every packed batch has a length of its own; what compiling costs is told apart from what a step costs after it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from smartmops.bench.sides import BenchConfig, Lab, Side, alternate, clocked

HERE = Path(__file__).parent
REPEATS = 5


def epoch(lab: Lab, side: Side) -> Callable[[], None]:
    """Forward and backward of every batch once, without an optimiser."""
    batches = [side.collate(group) for group in lab.groups()]

    def run() -> None:
        for batch in batches:
            side.model(**batch).loss.backward()
            side.model.zero_grad()

    return run


def main(data: str) -> None:
    """Measure and write both files."""
    config = replace(BenchConfig(out=HERE, data=data), batches=4)
    torch.set_num_threads(config.threads)
    lab = Lab(config)
    plain, compiled = lab.side("mops"), lab.side("mops")
    for layer in compiled.model.base_model.model.model.layers[config.injection_layer :]:
        layer.compile(dynamic=True)
    found: dict[str, Any] = {"torch": torch.__version__, "threads": config.threads, "repeats": REPEATS}
    steps = {"plain": epoch(lab, plain), "compiled": epoch(lab, compiled)}
    started = time.perf_counter()
    try:
        steps["compiled"]()
    except Exception as error:  # whatever the compiler raises is the finding
        found["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    else:
        found["seconds_of_first_pass"] = time.perf_counter() - started
        times = alternate({name: lambda step=step: clocked(step) for name, step in steps.items()}, REPEATS)
        found |= {"seconds": {name: median(values) for name, values in times.items()}, "all": times}
        found["ratio"] = found["seconds"]["plain"] / found["seconds"]["compiled"]
    (HERE / "compiled.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "compiled.md").write_text("\n".join(lines(found)) + "\n")


def lines(found: dict[str, Any]) -> list[str]:
    """The page."""
    head = ["# torch.compile of the upper half\n",
            "Written by `python benchmarks/compiled.py` from `compiled.json`: forward and backward from cached activations, the shape "
            f"of [speed.md](speed.md), {found['threads']} threads, torch {found['torch']}.\n"]  # fmt: skip
    if "error" in found:
        return [*head, f"Compiling failed: `{found['error']}`."]
    s = found["seconds"]
    return [*head, f"Plain {s['plain']:.2f} s, compiled {s['compiled']:.2f} s for the same batches (medians of {found['repeats']}, taking "
            f"turns): {found['ratio']:.2f} times as fast. The first pass, which compiles, takes {found['seconds_of_first_pass']:.0f} s."]  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "office")
