"""Where the time of a training step goes, and how fast its matrix products are beside the machine's best.

    python benchmarks/step_profile.py [DATA]      writes step_profile.json and step_profile.md beside itself

Shape and batches are those of `smartmops bench`: forward and backward from cached activations, without HF's Trainer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from compiled import epoch
from torch.profiler import ProfilerActivity, profile

from smartmops.bench.sides import BenchConfig, Lab, clocked, matmul_rate, step_flops

HERE = Path(__file__).parent
REPEATS = 5
KINDS = {  # what an operator's name holds -> what it is; the first that fits
    "flash_attention": "attention over text (flash kernel, forward and backward)",
    "aten::bmm": "batched products (attention to the prompts)",
    "aten::mm": "products of linear layers and head",
    "softmax": "softmax",
    "aten::mul": "multiplications (norms, rotations, gates of the MLP)",
    "aten::add": "additions",
    "aten::fill_": "filling with zeros",
    "aten::copy_": "copies",
}
PRODUCTS = KINDS["aten::mm"]


def main(data: str) -> None:
    """Measure and write both files."""
    config = replace(BenchConfig(out=HERE, data=data), batches=4)
    torch.set_num_threads(config.threads)
    lab = Lab(config)
    side = lab.side("mops")
    side.model.train()
    run = epoch(lab, side)
    run()
    seconds = [clocked(run) for _ in range(REPEATS)]
    parts = [_parts(run) for _ in range(REPEATS)]
    found: dict[str, Any] = {
        "torch": torch.__version__, "threads": config.threads, "repeats": REPEATS, "flops": _flops(lab),
        "peak_flops_per_second": max(matmul_rate(size) for _ in range(3) for size in config.peak_sizes),
        "seconds": median(seconds), "parts": {name: median(each[name] for each in parts) for name in parts[0]},
        "all": {"seconds": seconds, "parts": parts},
    }  # fmt: skip
    (HERE / "step_profile.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "step_profile.md").write_text("\n".join(lines(found)) + "\n")


def _flops(lab: Lab) -> dict[str, int]:
    """The arithmetic of all batches."""
    counts = [
        step_flops(lab.config, [lab.lengths[i] for i in group], sum(lab.predicted[i] for i in group))
        for group in lab.groups()
    ]
    return {name: sum(each[name] for each in counts) for name in counts[0]}


def _parts(run: Callable[[], None]) -> dict[str, float]:
    """Seconds of each kind of operator (its own, without what it calls)."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    found = dict.fromkeys([*KINDS.values(), "everything else"], 0.0)
    for event in profiler.key_averages():
        kind = next((kind for part, kind in KINDS.items() if part in event.key), "everything else")
        found[kind] += event.self_cpu_time_total / 1e6
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """The page."""
    flops, parts, peak = found["flops"], found["parts"], found["peak_flops_per_second"]
    total, profiled = sum(flops.values()), sum(parts.values())
    rate = (flops["linear"] + flops["head"]) / parts[PRODUCTS]
    others = profiled - parts[PRODUCTS]
    table = [f"| {name} | {seconds:.2f} | {100 * seconds / profiled:.0f} % |" for name, seconds in parts.items()]
    return [
        "# Where the time of a training step goes",
        "",
        "Written by `python benchmarks/step_profile.py` from `step_profile.json`: forward and backward of all batches of "
        f"[speed.md](speed.md) from cached activations, float32, {found['threads']} threads, torch {found['torch']}, "
        f"medians of {found['repeats']}.",
        "",
        "| operators | seconds | share |",
        "|---|---|---|",
        *table,
        "",
        f"Without the profiler {found['seconds']:.2f} s for {total / 1e9:.0f} GFLOP, {total / found['seconds'] / peak:.2f} of "
        f"the {peak / 1e9:.0f} GFLOP/s of this machine's best square products; at those the arithmetic alone takes "
        f"{total / peak:.2f} s. The products of linear layers and head run at {rate / 1e9:.0f} GFLOP/s, {rate / peak:.2f} of "
        "the best: their inner dimensions are those of the model's hidden states, not thousands. All else together takes "
        f"{others:.2f} s and does {100 * flops['attention'] / total:.0f} % of the arithmetic. A share of 0.6 leaves "
        f"{total / peak / 0.6 - parts[PRODUCTS]:.2f} s for it; [compiling](compiled.md) does not get there.",
    ]


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "office")
