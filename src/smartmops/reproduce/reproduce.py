"""`smartmops reproduce NAME`: which cells a table or figure needs, and the page that is written from their results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from smartmops.training.runs import write_text

from . import figures, tables
from .grid import Base, Cell, Data, Grid, by_seed_first

console = Console()

Name = Literal["table2", "table3", "table5", "figure5"]
FEDERATED: dict[str, dict[str, str]] = {
    "fedprompt": {},
    "mops": {},
    "mops-expert-weighted": {"method": "mops", "aggregation": "expert-weighted"},
}
TITLES = {
    "table2": "Central training (paper, table 2)",
    "table3": "Federated training (paper, table 3)",
    "table5": "Federated training on int8 bases (paper, table 5)",
    "figure5": "What the gate does before, during and after federated training (paper, figures 5 and 9 to 11)",
}


@dataclass(kw_only=True)
class ReproduceConfig:
    """A table or figure of the paper on a model and data of your own, beside the paper's numbers.

    Finished cells are kept as JSON under OUT/results and never run again; a killed grid goes on where it was.
    """

    name: Annotated[Name, tyro.conf.Positional]
    model: str = "tiny"  # MODEL, dense; it is compressed as the table asks
    data: tuple[str, ...] = ("dolly", "superni")  # DATA, or NAME=DATA where a path says too little
    out: Path | None = None  # None: runs/reproduce
    bases: tuple[str, ...] = ()  # none given: the table's own
    methods: tuple[str, ...] = ()  # none given: the table's own
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: float | None = None  # minutes; no cell is begun after them
    limit: int | None = 5000  # examples drawn from each data set; 0: all
    calibration: str | None = None  # DATA or text that pruning is calibrated on; None: each data set's training split
    clients: int | None = None  # None: 100 (table 5: 10)
    clients_per_round: int = 10
    rounds: int = 20
    local_steps: int = 250  # optimiser steps of a client in a round
    steps: int | None = None  # of central training; None: as many as all clients make together
    batch_size: int = 1  # examples
    max_length: int = 512  # tokens; longer examples lose the end of their context
    eval_every: int = 5  # rounds
    rates: dict[str, float] = field(default_factory=dict)  # Adam's for prompts, by method; else the default of `train`
    activations: str = "auto"  # as for `train`
    tables_only: bool = False  # run nothing, write pages from what is there


def reproduce(config: ReproduceConfig) -> dict[str, Any]:
    """Run the missing cells, write Markdown and pictures; returns how many cells there are and how many are missing.

    Raises:
        ValueError: data, base or method is unknown; the message names the way out.
    """
    out = config.out or Path("runs/reproduce")
    limit = config.limit or None
    grid = Grid(out, config.model, limit, config.calibration)
    cells = cells_of(config)
    for base in {cell.base for cell in cells}:
        base.compression()
    missing = grid.missing(cells) if config.tables_only else grid.run(cells, config.budget)
    found = grid.read(cells)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / f"{config.name}.md", "\n".join(_page(config, list(found.values()), out)) + "\n")
    console.print(f"{out / f'{config.name}.md'}: {len(found)} of {len(cells)} cells are there")
    if missing:
        console.print(f"missing: {', '.join(cell.key for cell in missing[:3])}{' ...' if len(missing) > 3 else ''}; "
                      "the same command goes on with them")  # fmt: skip
    return {"cells": len(cells), "missing": len(missing)}


def cells_of(config: ReproduceConfig) -> list[Cell]:
    """All cells, those that say most first.

    Raises:
        ValueError: a method is none of the table's.
    """
    makers: dict[str, Callable[[ReproduceConfig, int], Iterable[Cell]]] = {
        "table2": _central, "table3": _federated, "table5": _federated, "figure5": _gates,
    }  # fmt: skip
    return by_seed_first(lambda seed: makers[config.name](config, seed), config.seeds)


def _datas(config: ReproduceConfig) -> list[Data]:
    found = []
    for given in config.data:
        name, _, path = given.rpartition("=")
        found.append(Data(name or Path(given).stem or given, path))
    return found


def _methods(config: ReproduceConfig, known: Sequence[str]) -> Sequence[str]:
    if unknown := [name for name in config.methods if name not in known]:
        raise ValueError(f"--methods {unknown[0]}: {config.name} knows {', '.join(known)}")
    return config.methods or known


def _common(config: ReproduceConfig, method: str) -> dict[str, Any]:
    own = FEDERATED.get(method, {}).get("method", method)
    rate = config.rates.get(method, config.rates.get(own))
    return {"method": own, "batch_size": config.batch_size, "prompt_lr": rate, "activations": config.activations,
            "max_length": config.max_length, "samples_per_task": 0}  # fmt: skip


def _central(config: ReproduceConfig, seed: int) -> Iterator[Cell]:
    steps = config.steps or config.rounds * config.clients_per_round * config.local_steps
    length = {"steps": steps, "save_every": max(steps // 10, 1), "log_every": max(steps // 50, 1)}
    for base in config.bases or ("dense", "90%", "85%", "75%", "7:8", "2:4"):
        for data in _datas(config):
            for method in _methods(config, ("prompt-tuning", "mops")):
                yield Cell("train", data, Base(base), method, seed, _common(config, method) | length)


def _rounds(config: ReproduceConfig, method: str) -> dict[str, Any]:
    clients = config.clients or (10 if config.name == "table5" else 100)
    return _common(config, method) | {
        "clients": clients, "clients_per_round": config.clients_per_round, "rounds": config.rounds,
        "local_steps": config.local_steps, "eval_every": config.eval_every,
    } | FEDERATED.get(method, {})  # fmt: skip


def _federated(config: ReproduceConfig, seed: int) -> Iterator[Cell]:
    int8 = config.name == "table5"
    own = ("int8+75%", "int8+85%", "int8+7:8", "int8+2:4") if int8 else ("dense", "75%", "85%", "7:8")
    known = ("fedprompt", "mops") if int8 else tuple(FEDERATED)
    for base in config.bases or own:
        for data in _datas(config):
            for method in _methods(config, known):
                yield Cell("federate", data, Base(base), method, seed, _rounds(config, method))


def _gates(config: ReproduceConfig, seed: int) -> Iterator[Cell]:
    """The same cells as table 3's, of one base: dense, unless told otherwise."""
    if seed == config.seeds[0]:
        for base in config.bases[:1] or ("dense",):
            for data in _datas(config):
                yield Cell("federate", data, Base(base), "mops", seed, _rounds(config, "mops"))


def _page(config: ReproduceConfig, found: Sequence[dict[str, Any]], out: Path) -> Iterator[str]:
    datas, bases = [data.name for data in _datas(config)], list(dict.fromkeys(each["base"] for each in found))
    yield f"# {TITLES[config.name]}\n"
    yield (f"Written by `smartmops reproduce {config.name}` from `results/`. Perplexity over response tokens of the "
           "test split: mean ± standard deviation over seeds. A gain is the reduction of the baseline's perplexity, "
           "paired by seed; the paper's numbers are of Llama-7B, one run each.\n")  # fmt: skip
    if found:
        yield _setting(found)
    if config.name == "figure5":
        yield from _heatmaps(found, out)
        return
    baseline, *others = _methods(
        config, ("prompt-tuning", "mops") if config.name == "table2" else
        ("fedprompt", "mops") if config.name == "table5" else tuple(FEDERATED),
    )  # fmt: skip
    yield from tables.table(
        config.name, tables.perplexities(found), datas, bases, baseline, others, tables.frozen_of(found)
    )
    if config.name == "table3":
        for data in datas:
            if any(each["data"] == data for each in found):
                figures.rounds(found, bases, data, out / f"rounds_{data}")
                yield f"![Perplexity by round on {data}](rounds_{data}.png)\n"


def _setting(found: Sequence[dict[str, Any]]) -> str:
    s = found[0]["settings"]
    if found[0]["command"] == "train":
        what = f"{s['steps']} steps of {s['batch_size']}"
    else:
        what = (f"{s['rounds']} rounds of {s['clients_per_round']} of {s['clients']} clients, {s['local_steps']} local "
                f"steps of {s['batch_size']}, one part of each category {s['skew']:g} times the others")  # fmt: skip
    rates = {tables.NAMES.get(each["method"], each["method"]): each["settings"]["prompt_lr"] for each in found}
    words = ", ".join(f"{name} {'as by default' if rate is None else f'{rate:g}'}" for name, rate in rates.items())
    return (f"{s['experts']} experts of {s['prompts_per_expert']} prompts; {what}; examples of at most "
            f"{s['max_length']} tokens. Adam's rates: gate {s['gate_lr']:g}, prompts of {words}.\n")  # fmt: skip


def _heatmaps(found: Sequence[dict[str, Any]], out: Path) -> Iterator[str]:
    for each in found:
        name = f"gates_{each['data']}_{each['base']}".replace(":", "-").replace("%", "")
        figures.gates(each["gates"], f"{each['data']}, {each['base']}, seed {each['seed']}", out / name)
        yield f"![Gate weights on {each['data']}, {each['base']}]({name}.png)\n"
