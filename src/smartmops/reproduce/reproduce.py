"""`smartmops reproduce NAME`: runs what a table or figure still needs, then writes its page from the results."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smartmops.checks.errors import ConfigError
from smartmops.checks.limits import check
from smartmops.evidence.page import markdown
from smartmops.options.reproduce import ReproduceConfig
from smartmops.progress.bars import console
from smartmops.runs.folder import write_text

from .grid import Base, Grid
from .inputs import same_grid
from .pages import page_of, skew_page
from .plan import Plan, datas_of
from .studies import STUDIES, Study


def reproduce(config: ReproduceConfig) -> dict[str, Any]:
    """Run the missing cells, write Markdown and pictures; returns how many cells there are and how many are missing.

    Raises:
        SmartmopsError: data, base or method is unknown, or `out` belongs to another model, limit or data; the message
            names the way out.
    """
    check(config)
    out = config.out or Path("runs/reproduce")
    until = math.inf if config.budget is None else time.monotonic() + 60 * config.budget
    names = list(STUDIES) if config.name == "all" else [config.name]
    plans = {name: plan_of(config, name) for name in names}
    _check_named(config, list(plans.values()))
    out.mkdir(parents=True, exist_ok=True)
    counts = {"cells": 0, "missing": 0}
    needed = [(Base(name), data) for plan in plans.values() for name in plan.names() for data in plan.datas]
    for base, _ in needed:
        base.compression()
    datas = {data.name: data for plan in plans.values() for data in plan.datas}
    grid = next(iter(plans.values())).grid
    same_grid(grid, list(datas.values()), keep=not config.tables_only)
    if not config.tables_only:
        grid.check_texts(needed)  # before the first cell of any plan
        for plan in plans.values():
            _run(plan, until)
    found = {name: list(plan.grid.read(plan.cells()).values()) for name, plan in plans.items()}
    pages = [page_of(name, plan, found[name], out) for name, plan in plans.items()]
    if config.name == "all":
        pages.append(skew_page(found["table2"], found["table3"]))
    for page in pages:
        write_text(out / f"{page.name}.md", markdown(page) + "\n")
    for name, plan in plans.items():
        counts["cells"] += plan.count()
        counts["missing"] += plan.count() - len(found[name])
    console.print(f"{out}: {counts['cells'] - counts['missing']} of {counts['cells']} cells are there")
    if counts["missing"]:
        console.print("the same command goes on with those that are missing")
    if config.name == "all":
        from smartmops.evidence.html import write_html

        write_html(pages, out, out / "report.html")
    return counts


def _check_named(config: ReproduceConfig, plans: Sequence[Plan]) -> None:
    """Whether all data and rates that were named are of some table.

    Raises:
        ConfigError: one is of none, and would do nothing.
    """
    taken = {data for plan in plans for data in plan.datas}
    if left := [data for data in datas_of(config.data) if data not in taken]:
        asked = ", ".join(plans[0].study.datas)
        raise ConfigError(f"--data {left[0].path}: {config.name} is of {asked} where they are given, so "
                          f"{left[0].name!r} would not be read: leave it away")  # fmt: skip
    rated = sorted({name for plan in plans if config.rates for name in plan.rated()})
    for name in config.rates:
        if name not in rated:
            raise ConfigError(f"--rates {name} {config.rates[name]}: no line of {config.name} takes it, choose from "
                              f"{', '.join(rated)}")  # fmt: skip


def _run(plan: Plan, until: float) -> None:
    """First what settings are chosen by, then the table itself."""
    tries = plan.tries()
    if plan.grid.run(tries, until):
        plan.grid.run(tries, until, wait=True)
    plan.grid.run(plan.cells(), until)


def plan_of(config: ReproduceConfig, name: str) -> Plan:
    """The cells of one table on this config's model and data.

    Raises:
        ConfigError: a method is none of the table's.
    """
    study = STUDIES[name]
    grid = Grid(config.out or Path("runs/reproduce"), config.model, config.limit or None, config.calibration,
                config.columns)  # fmt: skip
    given = datas_of(config.data or study.datas)
    datas = [data for data in given if data.name in study.datas] or given
    shared = {"train": _central(config), "federate": _federated(config, study)}
    only = config.methods
    plan = Plan(study, grid, datas, config.seeds, shared, config.bases, only, config.rates, config.tune)
    for data in datas if only else ():
        plan.variants(data)
    return plan


def _common(config: ReproduceConfig) -> dict[str, Any]:
    own = {"columns": config.columns} if config.columns else {}
    return own | {"batch_size": config.batch_size, "prompt_lr": None, "activations": config.activations,
                  "max_length": config.max_length, "samples_per_task": 0}  # fmt: skip


def _central(config: ReproduceConfig) -> dict[str, Any]:
    """Of `train`; without recovery prompts, which are a row of the ablation."""
    steps = config.steps or max(1, 2 * config.rounds * config.clients_per_round * config.local_steps // 5)
    return _common(config) | {"recovery_prompts": 0, "steps": steps, "save_every": max(steps // 10, 1),
                              "log_every": max(steps // 50, 1)}  # fmt: skip


def _federated(config: ReproduceConfig, study: Study) -> dict[str, Any]:
    few = study.bases[0].startswith("int8")  # the paper's table 5 has 10 clients
    return _common(config) | {
        "clients": config.clients or (10 if few else 100), "clients_per_round": config.clients_per_round,
        "rounds": config.rounds, "local_steps": config.local_steps, "eval_every": config.eval_every,
    }  # fmt: skip
