"""A grid of cells: each one run under one config, finished once and never run again.

Knows run folders and results files. A cell is claimed while it runs, so several processes can work on one grid.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from transformers import AutoTokenizer

from smartmops.base import local
from smartmops.checks.errors import ConfigError
from smartmops.checks.folders import beside
from smartmops.compression import calibration
from smartmops.compression.compress import compress
from smartmops.federated.federate import federate
from smartmops.flow.trainer import train
from smartmops.methods.baselines import load_run
from smartmops.options.compression import CompressConfig
from smartmops.options.federation import FederateConfig
from smartmops.options.method import EMBEDDED_RATE
from smartmops.options.training import EMBEDDED_SETTING, TrainConfig
from smartmops.progress.bars import console
from smartmops.runs.folder import Run, write_text
from smartmops.traits import METHODS

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NOT_SETTINGS = {"out", "resume", "model", "data", "seed", "activations", "rows", "actors", "engine", "save_every",
                "log_every"}  # of a run, in its results  # fmt: skip


@dataclass(frozen=True)
class Data:
    """A data set and what tables call it."""

    name: str
    path: str  # DATA as `train` takes it


@dataclass(frozen=True)
class Base:
    """The frozen base, dense or compressed in the paper's notation: `dense`, `75%`, `7:8`, `int8`, `int8+75%`."""

    name: str

    def compression(self) -> dict[str, Any]:
        """Settings for `CompressConfig`; empty for the dense base.

        Raises:
            ConfigError: the name is none of these.
        """
        settings: dict[str, Any] = {}
        for part in [] if self.name == "dense" else self.name.split("+"):
            if part == "int8":
                settings["int8"] = True
            elif re.fullmatch(r"\d+:\d+", part):
                settings["pattern"] = part
            elif re.fullmatch(r"\d+(\.\d+)?%", part):
                settings["sparsity"] = float(part[:-1]) / 100
            else:
                raise ConfigError(f"base {self.name!r}: choose dense, a sparsity such as 75%, a pattern such as 7:8, "
                                  "int8, or int8+75%")  # fmt: skip
        return settings


@dataclass(frozen=True)
class Cell:
    """One run of a table: which command, on what, with which settings."""

    command: Literal["train", "federate"]
    data: Data
    base: Base
    method: str  # as the table calls it
    seed: int
    settings: Mapping[str, Any] = field(hash=False)  # of `TrainConfig` or `FederateConfig`
    over: Cell | None = None  # whose adapter is merged into the base first

    @property
    def key(self) -> str:
        """Name of its run folder and results file: what a reader looks for, and a digest of all settings."""
        decisive = {name: value for name, value in self.settings.items() if name not in NOT_SETTINGS}
        below = [self.over.key] if self.over else []
        words = json.dumps([self.command, decisive, *below], sort_keys=True, default=str)
        digest = blake2b(words.encode(), digest_size=4).hexdigest()
        parts = [self.data.name, self.base.name, self.method, f"seed{self.seed}", digest]
        return "_".join(re.sub(r"[^\w.+-]", "-", part) for part in parts)


@dataclass
class Grid:
    """Where a grid lives, and on what it runs.

    Attributes:
        out: Holds `results/` (one JSON per cell), `runs/` and `bases/`.
        model: MODEL, the dense base.
        calibration: DATA or text that pruning is calibrated on; None: the training split of the cell's data.
        columns: `FIELD=COLUMN` of that data, which the cells' own settings hold too.
    """

    out: Path
    model: str
    limit: int | None = None
    calibration: str | None = None
    columns: tuple[str, ...] = ()

    @property
    def results(self) -> Path:
        """Folder of the finished cells' numbers."""
        return self.out / "results"

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """Cells that have no results yet, in the order given."""
        return [cell for cell in cells if not (self.results / f"{cell.key}.json").is_file()]

    def read(self, cells: Iterable[Cell]) -> dict[Cell, dict[str, Any]]:
        """Results of the finished ones among the cells."""
        files = {cell: self.results / f"{cell.key}.json" for cell in cells}
        return {cell: json.loads(file.read_text()) for cell, file in files.items() if file.is_file()}

    def run(self, cells: Sequence[Cell], until: float = math.inf, wait: bool = False) -> list[Cell]:
        """Run what is missing, in the order given; returns what is still missing then.

        Args:
            cells: The ones that say most first.
            until: On `time.monotonic`'s clock; no cell is begun later.
            wait: For the cells that other processes are running, too.
        """
        todo = self.missing(cells)
        for number, cell in enumerate(todo, 1):
            if time.monotonic() > until:
                break
            with self._claim(cell, wait) as claimed:
                if claimed and self.missing([cell]):
                    console.rule(f"{number} of {len(todo)}: {cell.key}")
                    self._run(cell)
        return self.missing(cells)

    def _run(self, cell: Cell) -> None:
        began = time.perf_counter()
        folder = self.out / "runs" / cell.key
        common: dict[str, Any] = {"model": self.base(cell), "data": cell.data.path, "out": folder, "seed": cell.seed,
                                  "limit": self.limit, "resume": folder.exists(), "template": "plain",
                                  "dtype": "float32"}  # fmt: skip
        given = common | dict(cell.settings)
        if given.get("prompt_lr") is None and given.get("method") in METHODS and METHODS[given["method"]].ours:
            given["prompt_lr"] = EMBEDDED_RATE[given.get("init", "hidden_states")]
        if cell.command == "train":
            metrics = train(TrainConfig(**EMBEDDED_SETTING | given))
        else:
            metrics = federate(FederateConfig(**given))
        run = Run.open(folder)
        settings = {k: v for k, v in run.config["arguments"].items() if k not in NOT_SETTINGS}
        found = {
            "command": cell.command, "model": self.model, "data": cell.data.name, "base": cell.base.name,
            "method": cell.method, "seed": cell.seed, "metrics": metrics, "gates": run.read_gates(),
            "settings": settings, "versions": run.config["versions"], "seconds": time.perf_counter() - began,
        }  # fmt: skip
        self.results.mkdir(parents=True, exist_ok=True)
        write_text(self.results / f"{cell.key}.json", json.dumps(found, indent=1, default=str) + "\n")

    def base(self, cell: Cell) -> str:
        """MODEL of a cell: the dense base, or a folder that is compressed, or merged, when it is first needed."""
        if cell.over:
            return self._merged(cell.over)
        settings = cell.base.compression()
        if not settings:
            return self.model
        folder = self._compressed(cell.base, cell.data)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f"{folder.name}.lock"), wait=True):
            if not (folder / "metrics.json").is_file():
                text, columns, limit = self._text(cell.data)
                begun = folder.exists() or beside(folder).exists()
                compress(CompressConfig(model=self.model, out=folder, calibration=text, limit=limit, resume=begun,
                                        columns=columns, **settings))  # fmt: skip
        return str(folder)

    def _compressed(self, base: Base, data: Data) -> Path:
        """Folder of a compressed base."""
        name = base.name + ("" if self.calibration else f"_{data.name}")
        return self.out / "bases" / re.sub(r"[^\w.+-]", "-", name)

    def _text(self, data: Data) -> tuple[str, tuple[str, ...], int | None]:
        """What a base for cells of these data is calibrated on, with its `columns` and `limit`."""
        text = self.calibration or data.path
        return text, self.columns if text == data.path else (), None if self.calibration else self.limit

    def check_texts(self, needed: Iterable[tuple[Base, Data]]) -> None:
        """Whether there is text enough for each base that has yet to be pruned, by the data of its cells.

        Raises:
            DataError: there is too little.
        """
        texts = dict.fromkeys(
            self._text(data) for base, data in needed if {"sparsity", "pattern"} & base.compression().keys()
            and not (self._compressed(base, data) / "metrics.json").is_file()
        )  # fmt: skip
        if not texts:
            return
        tokenizer = AutoTokenizer.from_pretrained(local(self.model))
        for given, columns, limit in texts:
            text = calibration.load(given, limit, columns=columns)
            calibration.check_enough(text, tokenizer, CompressConfig.sequences)

    def _merged(self, below: Cell) -> str:
        """The base of a cell with the adapter of its run merged into the weights."""
        folder = self.out / "bases" / below.key
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f"{below.key}.lock"), wait=True):
            if not (folder / "config.json").is_file():
                run = self.out / "runs" / below.key
                if not (run / "metrics.json").is_file():
                    self._run(below)
                model, tokenizer, _ = load_run(run)
                unfinished = folder.with_name(f".{below.key}.tmp")
                model.merge_and_unload().save_pretrained(unfinished)
                tokenizer.save_pretrained(unfinished)
                unfinished.rename(folder)
        return str(folder)

    @contextmanager
    def _claim(self, cell: Cell, wait: bool = False) -> Iterator[bool]:
        place = self.out / "runs"
        place.mkdir(parents=True, exist_ok=True)
        with locked(place / f"{cell.key}.lock", wait) as claimed:
            yield claimed


@contextmanager
def locked(file: Path, wait: bool) -> Iterator[bool]:
    """Whether this process has the file to itself; a killed holder lets go."""
    if fcntl is None:
        yield True
        return
    with open(file, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
