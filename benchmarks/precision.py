"""What bfloat16 gains: steps of the same batches on a float32 base, under autocast, and on a bfloat16 base.

    python benchmarks/precision.py [DATA] [THREADS]      writes precision.json and precision.md beside itself

The shape and the batches are those of `smartmops bench`. Prompts and gate are float32 on every side. A bfloat16 base
has its cache of activations in bfloat16 too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from smartmops.bench.sides import BenchConfig, Lab, alternate, clocked

HERE = Path(__file__).parent
REPEATS = 5
SIDES = {"float32": (torch.float32, False), "autocast": (torch.float32, True), "bfloat16 base": (torch.bfloat16, False)}
INSTRUCTIONS = ("amx_bf16", "avx512_bf16")


def sides(lab: Lab) -> dict[str, Callable[[], tuple[list[float], torch.Tensor]]]:
    """For each, forward and backward of every batch: losses, and the gradient of the prompts over all batches."""
    found = {}
    for name, (dtype, cast) in SIDES.items():
        model = lab.adapted(lab.method("mops"))
        model.base_model.model.to(dtype)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        batches = [*map(lab.fill(model), lab.groups())]
        found[name] = _epoch(model.train(), batches, cast)
    return found


def _epoch(model: Any, batches: list[Any], cast: bool) -> Callable[[], tuple[list[float], torch.Tensor]]:
    prompts = model.base_model.layer().mops_prompts["default"]

    def run() -> tuple[list[float], torch.Tensor]:
        model.zero_grad()
        losses = []
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16) if cast else nullcontext():
                loss = model(**batch).loss
            loss.backward()
            losses.append(loss.item())
        return losses, prompts.grad.flatten().clone()

    return run


def main(data: str, threads: int) -> None:
    """Measure and write both files."""
    config = replace(BenchConfig(out=HERE, data=data), batches=4, threads=threads)
    torch.set_num_threads(threads)
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    steps = sides(Lab(config))
    losses = {name: step() for name, step in steps.items()}
    exact, gradient = losses["float32"]
    times = alternate({name: lambda step=step: clocked(step) for name, step in steps.items()}, REPEATS)
    found: dict[str, Any] = {
        "torch": torch.__version__, "threads": threads, "repeats": REPEATS,
        "cpu": [name for name in INSTRUCTIONS if name in flags],
        "seconds": {name: median(values) for name, values in times.items()}, "all": times,
        "loss": {name: sum(values) / len(values) for name, (values, _) in losses.items()},
        "largest_difference": {name: max(abs(a - b) for a, b in zip(exact, values, strict=True))
                               for name, (values, _) in losses.items()},
        "cosine": {name: torch.cosine_similarity(gradient, own, 0).item() for name, (_, own) in losses.items()},
    }  # fmt: skip
    (HERE / "precision.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "precision.md").write_text("\n".join(lines(found)) + "\n")


def lines(found: dict[str, Any]) -> list[str]:
    """The page."""
    base = found["seconds"]["float32"]
    rows = [
        f"| {name} | {seconds:.2f} | {base / seconds:.2f} | {found['loss'][name]:.4f} | "
        f"{found['largest_difference'][name]:.4f} | {found['cosine'][name]:.4f} |"
        for name, seconds in found["seconds"].items()
    ]
    return [
        "# bfloat16",
        "",
        "Written by `python benchmarks/precision.py` from `precision.json`: forward and backward from cached activations, the "
        f"shape of [speed.md](speed.md), {found['threads']} threads, torch {found['torch']}; this CPU's instructions "
        f"for bfloat16: {', '.join(found['cpu']) or 'none'}. Medians of {found['repeats']}, taking turns.",
        "",
        "| base | seconds for all batches | times as fast | mean loss, nats | largest difference of a batch | cosine of the "
        "prompts' gradient |",
        "|---|---|---|---|---|---|",
        *rows,
    ]


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "office", int(sys.argv[2]) if len(sys.argv) > 2 else 2)
