"""Options of `reproduce`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from smartmops.checks.folders import OutFolder
from smartmops.checks.limits import Count, Options, Positive, Rate, Seed, Several, Whole

from .compression import Calibration
from .training import Activations, Columns, Data, Model

BUILT_IN = ("office", "dolly", "superni")  # DATA whose columns are known

Name = Literal[
    "all", "table2", "table3", "table4", "table5", "table6", "table8", "figure3", "figure4", "figure5", "figure6",
    "ablation", "unseen", "answers", "interference",
]  # fmt: skip


@dataclass(frozen=True)
class Bases:
    """`dense`, a sparsity, a pattern, `int8`, or int8 with one of them."""

    def wrong(self, value: tuple[str, ...]) -> str | None:
        """As `limits.Limit`."""
        part = r"(int8|\d+:\d+|\d+(\.\d+)?%)"
        if all(each == "dense" or re.fullmatch(rf"{part}(\+{part})*", each) for each in value):
            return None
        return ": choose dense, a sparsity such as 75%, a pattern such as 7:8, int8, or int8+75%"


@dataclass(kw_only=True)
class ReproduceConfig(Options):
    """A table or figure of the paper on a model and data of your own, beside the paper's numbers.

    Finished cells are kept as JSON under OUT/results and never run again; a killed grid goes on where it was, and
    several processes may work on one grid. `all` goes through every name, and writes report.html.
    """

    name: Annotated[Name, tyro.conf.Positional]  # table or figure of the paper, or a study of ours; all: each of them
    model: Model = "tiny"  # MODEL, dense; it is compressed as the table asks
    data: tuple[Data, ...] = ()  # DATA, or NAME=DATA; none given: the table's own (dolly, superni, or dolly alone)
    columns: Columns = ()  # FIELD=COLUMN where data of your own name their columns differently, such as response=answer
    out: OutFolder | None = None  # None: runs/reproduce
    bases: Annotated[tuple[str, ...], Bases()] = ()  # none given: the table's own
    methods: tuple[str, ...] = ()  # lines of the table; none given: all
    seeds: Annotated[tuple[Seed, ...], Several("0 1 2")] = (0, 1, 2)  # each is a run of its own
    budget: Positive | None = None  # minutes; no cell is begun after them
    limit: Whole | None = 5000  # examples drawn from each data set; 0: all
    calibration: Calibration | None = None  # DATA or text that pruning is calibrated on; None: each training split
    clients: Count | None = None  # None: 100 (table 5: 10)
    clients_per_round: Count = 10  # clients drawn for each round
    rounds: Count = 20  # rounds of local training and averaging
    local_steps: Count = 250  # optimiser steps of a client in a round
    steps: Count | None = None
    """of central training; None: 2 for every 5 that all clients make together, as in the paper"""
    batch_size: Count = 1  # examples
    max_length: Count = 512  # tokens; longer examples lose the end of their context
    eval_every: Count = 5  # rounds
    tune: bool = True  # choose rates, and ranks of LoRA, on a part of the training split
    rates: dict[str, Rate] = field(default_factory=dict)  # Adam's for prompts, by line: not chosen by validation then
    activations: Activations = "auto"  # as for `train`
    tables_only: bool = False  # run nothing, write pages from what is there

    def problems(self) -> Iterator[str]:
        """What options have to do with each other."""
        there = self.clients or (10 if self.name == "table5" else 100)
        if self.clients_per_round > there:
            yield f"--clients-per-round {self.clients_per_round}, but there are {there} clients: choose 1 to {there}"
        own = [name for _, _, name in (text.rpartition("=") for text in self.data) if name not in BUILT_IN]
        if self.columns and (not own or len(own) < len(self.data)):
            named = next((text for text in self.data if text.rpartition("=")[2] in BUILT_IN), "those of the tables")
            yield (f"--columns {' '.join(self.columns)}: {named} have columns of their own: give --data of yours "
                   "alone, or leave the option away")  # fmt: skip
