"""Options of `reproduce`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import tyro

from smartmops.checks.columns import BUILT_IN
from smartmops.checks.folders import OutFolder
from smartmops.checks.limits import Count, Options, Positive, Rate, Seed, Several, Whole, unused

from .compression import Calibration
from .training import Activations, Columns, Data, Model

Name = Literal[
    "all", "table2", "table3", "table4", "table5", "table6", "table8", "figure3", "figure4", "figure5", "figure6",
    "ablation", "unseen", "answers", "interference",
]  # fmt: skip
FEDERATED = ("table3", "table5", "figure5")
OF_ONE_SEED = ("figure5", "figure6")  # they show gates, which are not averaged
COMPRESSED = ("all", "table2", "table3", "table4", "table5", "table6", "figure6")  # their bases, by default


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
class GridRun:
    """What is shown, and where its cells are kept."""

    ABOUT: ClassVar[str] = "run"

    name: Annotated[Name, tyro.conf.Positional]  # table or figure of the paper, or a study of ours; all: each of them
    out: OutFolder | None = None  # folder of cells and pages; by default runs/reproduce
    budget: Positive | None = None  # minutes; no cell is begun after them
    tables_only: bool = False  # run nothing, write pages from what is there


@dataclass(kw_only=True)
class GridBases:
    """The base model, dense and compressed."""

    ABOUT: ClassVar[str] = "base"

    model: Model = "tiny"  # MODEL, dense; it is compressed as the table asks
    bases: Annotated[tuple[str, ...], Bases()] = ()
    """forms of the base, such as dense, 75%, 7:8 or int8+75%; by default the table's own"""
    calibration: Calibration | None = None  # text or DATA that pruning is calibrated on; by default each training split
    activations: Activations = "auto"
    """where activations below the injection layer are cached: memory, off, a folder, or auto (memory if they fit)"""


@dataclass(kw_only=True)
class GridData:
    """What is trained and tested on."""

    ABOUT: ClassVar[str] = "data"

    data: tuple[Data, ...] = ()  # DATA, or NAME=DATA; by default the table's own (dolly, superni, or dolly alone)
    columns: Columns = ()  # FIELD=COLUMN where data of your own name their columns differently, such as response=answer
    limit: Whole | None = 5000  # examples drawn from each data set; 0: all
    max_length: Count = 512  # tokens of an example; a longer one is shortened at the end of its context


@dataclass(kw_only=True)
class GridLines:
    """The lines of the table."""

    ABOUT: ClassVar[str] = "comparison"

    methods: tuple[str, ...] = ()  # lines of the table; by default all
    seeds: Annotated[tuple[Seed, ...], Several("0 1 2")] = (0, 1, 2)  # each is a run of its own
    tune: bool = True  # do not choose rates, and ranks of LoRA, on a part of the training split
    rates: dict[str, Rate] = field(default_factory=dict)
    """learning rates by line of the table, which are not chosen by validation then"""


@dataclass(kw_only=True)
class GridRounds:
    """Rounds of clients, and the central steps that match them."""

    ABOUT: ClassVar[str] = "rounds"

    clients: Count | None = None  # number of clients; by default 100 (table 5: 10)
    clients_per_round: Count = 10  # clients drawn for each round
    rounds: Count = 20  # rounds of local training and averaging
    local_steps: Count = 250  # optimiser steps of a client in a round
    steps: Count | None = None
    """optimiser steps of central training; by default 2 for every 5 that all clients make together, as in the paper"""
    batch_size: Count = 1  # examples of a step
    eval_every: Count = 5  # rounds from one measurement to the next


@dataclass(kw_only=True)
class ReproduceConfig(GridRounds, GridLines, GridData, GridBases, GridRun, Options):
    """A table or figure of the paper on a model and data of your own, beside the paper's numbers.

    Finished cells are kept as JSON under OUT/results and never run again; a killed grid goes on where it was, and
    several processes may work on one grid. `all` goes through every name, and writes report.html.
    """

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

    def idle(self) -> Iterator[str]:
        """As `Options`."""
        federated, away = self.name == "all" or self.name in FEDERATED, "leave it away"
        yield from unused(self, ("clients", "eval_every"), federated,
                          f"is of federated training, and {self.name} has none: {away}")  # fmt: skip
        yield from unused(self, ("clients_per_round", "rounds", "local_steps"), federated or self.steps is None,
                          f"gives way to --steps in {self.name}: leave one of them away")  # fmt: skip
        yield from unused(self, ("steps", "tune"), self.name not in FEDERATED,
                          f"is of central training, and {self.name} has none: {away}")  # fmt: skip
        yield from unused(self, ("seeds",), self.name not in OF_ONE_SEED or len(self.seeds) == 1,
                          f"are several, and {self.name} shows one: give one")  # fmt: skip
        compressed = any(base != "dense" for base in self.bases) if self.bases else self.name in COMPRESSED
        yield from unused(self, ("calibration",), compressed,
                          f"is of bases that are compressed, and these are not: give --bases, or {away}")  # fmt: skip
        yield from unused(self, ("budget", "activations"), not self.tables_only,
                          "is of cells that are run, and --tables-only runs none: leave one of them away")  # fmt: skip
