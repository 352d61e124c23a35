"""Which cells a study needs: variants, bases, data and seeds multiplied, settings chosen by validation filled in.

Knows studies and finished results; runs nothing. What a variant tries on validation data are cells like any other, on
the study's first base, under a seed of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from smartmops.base import local
from smartmops.checks.errors import ConfigError
from smartmops.data.tasks import splits
from smartmops.tokens.batches import encode_all
from smartmops.tokens.template import Template

from .grid import Base, Cell, Data, Grid
from .studies import Study, Variant, held_out, layered

TRIAL_SEED = 100  # of what is tried on validation data; none that a table uses


@dataclass
class Plan:
    """The cells of one study.

    Attributes:
        shared: Settings of every cell, by command.
        bases: In place of the study's own, if any are given.
        only: Labels of variants; empty for all.
        given: Adam's rates for prompts by label of a variant (`federate:LABEL` for a federated one): not tried then.
        tune: Whether anything is tried; else the defaults of `train` hold.
    """

    study: Study
    grid: Grid
    datas: Sequence[Data]
    seeds: Sequence[int]
    shared: Mapping[str, Mapping[str, Any]]
    bases: Sequence[str] = ()
    only: Sequence[str] = ()
    given: Mapping[str, float] = field(default_factory=dict)
    tune: bool = True
    _variants: dict[str, tuple[Variant, ...]] = field(default_factory=dict)

    def variants(self, data: Data) -> tuple[Variant, ...]:
        """Of the study; some depend on the model's layers or on the data's tasks.

        Raises:
            ConfigError: `only` names one that is not there.
        """
        if data.name not in self._variants:
            self._variants[data.name] = self._select(self._all(data))
        return self._variants[data.name]

    def _all(self, data: Data) -> tuple[Variant, ...]:
        if self.study.kind == "unseen":
            return held_out(self._tasks(data))
        if not self.study.variants:
            return layered(AutoConfig.from_pretrained(local(self.grid.model)).num_hidden_layers)
        return self.study.variants

    def _select(self, known: tuple[Variant, ...]) -> tuple[Variant, ...]:
        labels = [variant.label for variant in known]
        if unknown := [label for label in self.only if label not in labels]:
            raise ConfigError(f"--methods {unknown[0]}: choose from {', '.join(labels)}")
        return tuple(variant for variant in known if not self.only or variant.label in self.only)

    def _tasks(self, data: Data) -> list[str]:
        """Those with a test example that fits the length."""
        _, test = splits(data.path, self.grid.limit, columns=self.grid.columns)
        tokenizer = AutoTokenizer.from_pretrained(local(self.grid.model))
        length, template = self.shared["train"]["max_length"], Template.of("plain", tokenizer)
        kept = encode_all(test, tokenizer, length, template=template).kept
        return sorted({test[i].category for i in kept})

    def names(self) -> list[str]:
        """Of the bases."""
        return list(self.bases or self.study.bases)

    def tries(self) -> list[Cell]:
        """What has to be run before the settings of every variant are known; each cell once."""
        found = [cell for data in self.datas for variant in self.variants(data) for cell in self._tries(variant, data)]
        return list(dict.fromkeys(found))

    def _tries(self, variant: Variant, data: Data) -> Iterator[Cell]:
        for other in (variant.like, variant.over):
            if other:
                yield from self._tries(other, data)
        if self._open(variant):
            base = Base(self.study.bases[0])
            for number, choice in enumerate(variant.among):
                settings = dict(self.shared["train"]) | dict(variant.settings) | dict(choice) | {"validation": True}
                yield Cell("train", data, base, f"{variant.label}, try {number}", TRIAL_SEED, settings)

    def _open(self, variant: Variant) -> bool:
        return self.tune and bool(variant.among) and variant.label not in self.given

    def chosen(self, variant: Variant, data: Data) -> dict[str, Any] | None:
        """The settings of a variant, with what did best on validation data; None where that is not known yet."""
        settings = self.chosen(variant.like, data) if variant.like else {}
        if settings is None:
            return None
        settings |= variant.settings
        key = f"federate:{variant.label}" if self.study.command == "federate" else variant.label
        rate = self.given.get(key, self.given.get(f"federate:{settings.get('method')}")
                              if self.study.command == "federate" else None)  # fmt: skip
        if rate is not None:
            settings["prompt_lr"] = rate
        if not self._open(variant):
            return settings
        own = [cell for cell in self._tries(variant, data) if cell.method.startswith(f"{variant.label}, try ")]
        found = self.grid.read(own)
        if len(found) < len(own):
            return None
        best = min(own, key=lambda cell: float(found[cell]["metrics"]["perplexity"]["overall"]))
        return settings | dict(variant.among[own.index(best)])

    def rated(self) -> set[str]:
        """What `given` may name."""
        chain = [variant for data in self.datas for variant in self.variants(data)]
        for variant in chain:
            chain += [other for other in (variant.like, variant.over) if other]
        if self.study.command == "train":
            return {variant.label for variant in chain}
        return {f"federate:{name}" for each in chain for name in (each.label, each.settings["method"])}

    def cells(self) -> list[Cell]:
        """All cells whose settings are known: those of the first seed first, so that a budget cuts seeds, not lines."""
        return [
            cell
            for seed in (self.seeds[:1] if self.study.kind == "gates" else self.seeds)
            for base in self.names()
            for data in self.datas
            for variant in self.variants(data)
            if (cell := self._cell(variant, data, base, seed))
        ]

    def _cell(self, variant: Variant, data: Data, base: str, seed: int) -> Cell | None:
        settings = self.chosen(variant, data)
        over = self._cell(variant.over, data, base, seed) if variant.over else None
        if settings is None or (variant.over and over is None):
            return None
        command = self.study.command
        settings = dict(self.shared[command]) | settings
        if fewer := settings.pop("fewer_steps", 0):
            settings["steps"] = max(1, settings["steps"] - fewer)
        return Cell(command, data, Base(base), variant.label, seed, settings, over)

    def count(self) -> int:
        """How many cells there will be once all settings are known."""
        seeds = 1 if self.study.kind == "gates" else len(self.seeds)
        return seeds * len(self.names()) * sum(len(self.variants(data)) for data in self.datas)


def datas_of(given: Sequence[str]) -> list[Data]:
    """DATA, or NAME=DATA where a path says too little.

    Raises:
        ConfigError: two have one name, by which their cells would be taken for each other's.
    """
    parts = [text.rpartition("=") for text in given]
    found = [Data(name or Path(path).stem or path, path) for name, _, path in parts]
    for first, other in combinations(found, 2):
        if first.name == other.name:
            raise ConfigError(f"--data {first.path} and {other.path} are both called {first.name!r}: give one a name "
                              f"of its own, as in other={other.path}")  # fmt: skip
    return found
