"""`smartmops bench`: rows of ratios with their targets, each kept as soon as it is measured.

Knows sections and files. Measures nothing itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Column, Table
from rich.text import Text

from smartmops.checks.limits import check
from smartmops.options.bench import BenchConfig
from smartmops.progress.bars import console
from smartmops.rows.example import of_examples
from smartmops.runs.folder import Run, write_text

from . import ratios, rows
from .sides import Lab, laboratory
from .targets import Section, Target

FILE = "sections.json"  # of a run folder: what is measured already


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure speed and memory on a base, or on a random Llama, against PEFT and the bare model, all in one run.

    Raises:
        RunExists: `out` holds something already, and `resume` is off.
        ConfigError: `only` names no ratio, or the data has too few examples; the message names the way out.
    """
    check(config)
    decisive = {name: value for name, value in asdict(config).items() if name not in ("only", "resume", "growth")}
    run = Run.create(config.out, {"command": "bench", "arguments": decisive, "seed": 0,
                                  "base": config.model or "random Llama", "data": config.data},
                     config.resume)  # fmt: skip
    with _settings(config.threads):
        lab = laboratory(config)
        run.same_inputs({"data set": of_examples(lab.examples)} | lab.inputs())
        machine = {"cores": os.cpu_count(), "threads": config.threads, "torch": torch.__version__,
                   "waiting": os.environ.get("OMP_WAIT_POLICY", "active").lower()}  # fmt: skip
        about = {"setting": _setting(config), "machine": machine, "gpu": "not measured", "examples": _examples(lab)}
        if config.growth:  # first, while the memory is all there
            about["growth"] = ratios.growth(lab)
        found = _measured(lab, config)
    share = sum(lab.predicted) / sum(lab.lengths)
    targets = ratios.TARGETS if config.model is None else {name: rows.target_of(name, share) for name in rows.TARGETS}
    metrics = about | found | {"targets": {
        name: {"value": targets[name].value, "at_least": targets[name].at_least, "what": targets[name].what,
               "met": targets[name].met(value)}
        for name, value in found["ratios"].items()
    }}  # fmt: skip
    _print(metrics["ratios"], targets)
    run.write_metrics(metrics)
    return metrics


def _measured(lab: Lab, config: BenchConfig) -> dict[str, Any]:
    """Ratios and raw numbers of all sections that are wanted, and of those that `out` has already."""
    file = config.out / FILE
    found = json.loads(file.read_text()) if file.is_file() else {"ratios": {}, "raw": {}}
    for section in ratios.SECTIONS if config.model is None else rows.SECTIONS:
        wanted = _wanted(section, config)
        if names := [name for name in wanted if name not in found["ratios"]]:
            measured, raw = section.measure(lab, names)
            found["ratios"] |= {name: measured[name] for name in names}
            found["raw"][section.name] = found["raw"].get(section.name, {}) | raw
            write_text(file, json.dumps(found, indent=1) + "\n")
            console.print(", ".join(f"{name} {_shown(measured[name])}" for name in names))
    return found


def _wanted(section: Section, config: BenchConfig) -> Sequence[str]:
    """Of a base that is named, sections are chosen; of the random Llama, ratios."""
    if config.model is not None:
        return section.ratios if not config.only or section.name in config.only else ()
    return [name for name in config.only or section.ratios if name in section.ratios]


@contextmanager
def _settings(threads: int) -> Iterator[None]:
    """So many threads, and the CPU for HF's Trainer too, as long as it lasts."""
    before, name = torch.get_num_threads(), "ACCELERATE_USE_CPU"
    stood = os.environ.get(name)
    torch.set_num_threads(threads)
    os.environ[name] = "true"
    try:
        yield
    finally:
        torch.set_num_threads(before)
        os.environ.pop(name)
        if stood is not None:
            os.environ[name] = stood


def _setting(config: BenchConfig) -> dict[str, Any]:
    """What was asked for, of the folders no more than the data's name."""
    model = config.model and Path(config.model).name
    return asdict(config) | {"data": Path(config.data).name, "out": config.out.name, "model": model}


def _examples(lab: Lab) -> dict[str, Any]:
    size = lab.config.batch_size
    padded = [max(lab.lengths[i : i + size]) * size for i in range(0, len(lab.lengths), size)]
    return {"count": len(lab.rows), "tokens": sum(lab.lengths), "predicted_tokens": sum(lab.predicted),
            "longest": max(lab.lengths), "padded_tokens": sum(padded)}  # fmt: skip


def _shown(found: float | None) -> str:
    return "not measured" if found is None else f"{found:.3g}"


def _print(found: Mapping[str, float | None], targets: Mapping[str, Target]) -> None:
    table = Table(Column("ratio", no_wrap=True), "what", "measured", "target", "", caption="on a GPU: not measured")
    for name, value in found.items():
        words = {True: ("met", "green"), False: ("not reached", "red"), None: ("", "")}
        met = Text(*words[targets[name].met(value)])
        table.add_row(name, targets[name].what, _shown(value), str(targets[name]), met)
    console.print(table)
