"""A run on the table: opened once, its data read again, measured before and after, and written as a run of its own.

Knows run folders and a model with an adapter. Knows nothing of what is changed.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from smartmops.checks.errors import RunError
from smartmops.checks.lock import alone
from smartmops.data.several import Names, held
from smartmops.data.tasks import read, split
from smartmops.evaluation.measure import measured
from smartmops.evaluation.perplexity import Evaluation
from smartmops.methods.baselines import base_of, load_run, template_of
from smartmops.options.training import TrainConfig
from smartmops.preparing import gating
from smartmops.reading.task import Task, same_test_split
from smartmops.rows.example import Example, of_examples
from smartmops.rows.stored import take
from smartmops.runs.folder import Run
from smartmops.states.instructions import instructions
from smartmops.tokens.batches import Encoded, encode_all
from smartmops.tokens.template import Template

from .adapter.parts import ADAPTER, Parts, put, taken

TEXT = 512  # tokens of a text of no task, at most: as a null expert is fitted
SEEN = 200  # instructions of the run's data, and of the new data, that a rule is fitted by
SHARE = 0.1  # of data that are given, tested on
ADDED = "added.safetensors"  # in a run's folder, what the gate reads of instructions of experts added by a rule


@dataclass
class Subject:
    """A run, its adapted model, and its own data where they can still be read."""

    run: Run
    model: Any
    tokenizer: Any
    parts: Parts
    rows: int  # examples that are measured, at most
    old: Names | None = None  # data in the place of its own
    own: Task | None = None
    why: str = ""  # why its own data cannot be read
    found: dict[Any, Any] = field(default_factory=dict)  # rows and tasks that are asked for again
    pooled: dict[str, Tensor] = field(default_factory=dict)  # what the gate reads, before standardisation
    added: dict[str, Tensor] = field(default_factory=dict)  # the same, of instructions of experts added by a rule

    @classmethod
    def open(cls, path: Path, old: str | None, columns: Sequence[str], rows: int, kept: Any = None) -> Subject:
        """Load a run; `kept` is one that is loaded already, whose adapter is that of the run at `path`.

        Raises:
            FileNotFoundError: there is no finished run.
            ValueError: it has no experts of keys and values that a gate chooses, or its adapter is damaged.
        """
        _check_kind(Run.open(path))
        model, tokenizer, run = kept or load_run(path)
        file = run.path / ADDED
        added = load_file(file) if file.is_file() else {}
        subject = cls(run, model, tokenizer, taken(model), rows, old, added=added)
        try:
            subject.own = subject.task(*_again(run, old, columns), old is None)
        except (OSError, ValueError) as error:
            if old is not None:
                raise
            subject.why = str(error)
        return subject

    def task(self, data: Names, columns: Sequence[str] = (), same: bool = False, share: float = SHARE,
             limit: int | None = None, seed: int = 0) -> Task:  # fmt: skip
        """Examples in tokens, as this run reads them; with `same`, split as it was when the run was trained."""
        given = self.run.config["arguments"]
        config = self.config(data, share if not same else given["test_share"])
        if same:
            config = replace(config, limit=given.get("limit"), columns=tuple(columns),
                             data_seed=given.get("data_seed", given["seed"]),
                             validation_share=given.get("validation_share", 0.1),
                             validation_limit=given.get("validation_limit", 200),
                             hold_out=given.get("hold_out"), validation=given.get("validation", False),
                             rows=_rows_of(self.run))  # fmt: skip
            task = Task.load(config, self.model, self.tokenizer)
            same_test_split(self.run, task.test_split)
            return task
        examples = read(data, columns=columns)
        return self.of(examples if limit is None else some(examples, limit), config, seed)

    def of(self, examples: Sequence[Example], config: TrainConfig, seed: int) -> Task:
        """These examples, split into training and test part."""
        train, test = split(examples, config.test_share, seed)
        task = Task.of(self.model, self.tokenizer, train, test, config)
        task.test_split = of_examples(test)
        return task

    def config(self, data: Names, share: float = SHARE, **more: Any) -> TrainConfig:
        """What the run was trained with, as far as reading data is concerned."""
        given = self.run.config["arguments"]
        return TrainConfig(model=base_of(self.run), out=self.run.path, data=held(data), test_share=share,
                           max_length=given["max_length"], template=template_of(self.run), **more)  # fmt: skip

    @property
    def template(self) -> Template:
        """That texts are rendered with."""
        return Template.of(template_of(self.run), self.tokenizer)

    def known(self) -> Task:
        """The run's own data.

        Raises:
            ValueError: they cannot be read any more.
        """
        if self.own is None:
            raise RunError(f"the data of {self.run.path} cannot be used ({self.why}): give instructions that the run "
                             "serves by --old DATA")  # fmt: skip
        return self.own

    def read(self, what: str, rows: Sequence[Encoded]) -> Float[Tensor, "n inputs"]:
        """What the gate reads of rows, standardised; `what` they are is read once."""
        if what not in self.pooled:
            self.pooled[what] = instructions(self.model, rows)
        found: Tensor = self.model.base_model.layer(ADAPTER).standardised(self.pooled[what], ADAPTER)
        return found

    def unrelated(self, file: Path | None = None) -> Float[Tensor, "n inputs"]:
        """What the gate reads of texts of no task."""
        examples = [Example(text, "", ".") for text in gating.unrelated_texts(file)]
        rows = encode_all(examples, self.tokenizer, TEXT, template=self.template).rows
        return self.read(f"unrelated {file}", rows)

    def instructions(self) -> tuple[Sequence[Encoded], Float[Tensor, "n inputs"]]:
        """Some of the run's training rows, as many of each task, and what the gate reads of them."""
        rows = instructions_of(self.known(), SEEN)
        return rows, self.read("own", rows)

    def others(self) -> Float[Tensor, "n inputs"]:
        """What the gate reads of instructions that experts of this run answer, those added later included."""
        layer = self.model.base_model.layer(ADAPTER)
        later = [layer.standardised(pooled, ADAPTER) for pooled in self.added.values()]
        return torch.cat([self.instructions()[1], *later])

    def part(self, wanted: str) -> str:
        """The part of the data that `held` takes rows from: the test part where the other holds none."""
        return wanted if len(getattr(self.known(), wanted)) else "test"

    def held(self, part: str = "test") -> Sequence[Encoded]:
        """Rows of the run's data that it was not trained on, at most `rows` of them: the same object every time."""
        if part not in self.found:
            self.found[part] = some(getattr(self.known(), self.part(part)), self.rows)
        found: Sequence[Encoded] = self.found[part]
        return found

    def measure(self, task: Task, rows: Sequence[Encoded], parts: Parts | None = None) -> Evaluation:
        """Perplexity of rows with the adapter as it is, or another in its place."""
        put(self.model, parts or self.parts)
        return measured(task, self.model, rows)

    def frozen(self, task: Task, rows: Sequence[Encoded]) -> Evaluation:
        """Perplexity of rows without any expert."""
        put(self.model, self.parts)
        with gating.closed(self.model):
            return measured(task, self.model, rows)

    def weights(self, rows: Sequence[Encoded], what: str, parts: Parts | None = None) -> Weights:
        """Who answers rows."""
        put(self.model, parts or self.parts)
        self.read(what, rows)
        return self.weigh(self.pooled[what])

    def weigh(self, pooled: Float[Tensor, "n inputs"]) -> Weights:
        """Who answers instructions, of which the gate reads this, with the adapter that the model has."""
        layer = self.model.base_model.layer(ADAPTER)
        with torch.no_grad():
            gate, lost = layer.gate(pooled, ADAPTER), layer.null_weight(pooled, ADAPTER)
        return Weights(gate, gate.new_zeros(len(gate)) if lost is None else lost)


@dataclass(frozen=True)
class Weights:
    """Who answers some instructions."""

    gate: Float[Tensor, "n experts"]  # weights, less what is left to the base
    lost: Float[Tensor, " n"]  # weight of the null expert

    def mean(self) -> list[float]:
        """Of each expert."""
        return [float(each) for each in self.gate.mean(0)]

    def left(self) -> float:
        """Share of the instructions that are left to the base entirely."""
        return float((self.lost >= 1).float().mean())


def parts_names(model: Any) -> list[str]:
    """Names of a model's experts."""
    found: list[str] = model.peft_config[ADAPTER].named_experts
    return found


def some(items: Sequence[Any], count: int) -> Sequence[Any]:
    """At most so many, drawn at random, in the order given."""
    if len(items) <= count:
        return items
    return take(items, sorted(random.Random(0).sample(range(len(items)), count)))


def instructions_of(task: Task, count: int) -> list[Encoded]:
    """Some of a task's training rows, as many of each category."""
    tasks = sorted({row.category for row in task.train})
    return [task.train[i] for i in gating.draw([tasks.index(row.category) for row in task.train], count, 0)]


def fingerprints(run: Run) -> dict[str, str]:
    """What tells a run's base and template from any others.

    Raises:
        ValueError: the run kept nothing of the kind.
    """
    stored = run.read_inputs()
    names = ("base", "tokenizer or template")
    if not set(names) <= stored.keys():
        raise RunError(f"{run.path} has no fingerprint of its base in inputs.json, so nothing tells whether experts "
                         "of it would fit: train it again with `smartmops train`")  # fmt: skip
    return {name: stored[name] for name in names}


def _again(run: Run, old: str | None, columns: Sequence[str]) -> tuple[Names, Sequence[str]]:
    given = run.config["arguments"]
    return (old, columns) if old is not None else (given["data"], given.get("columns", ()))


def _rows_of(run: Run) -> str:
    """`rows` as a run was trained with; memory where nothing can be written there any more."""
    rows = str(run.config["arguments"].get("rows", "memory"))
    place = Path(rows) if Path(rows).exists() else Path(rows).absolute().parent
    return rows if rows != "memory" and place.is_dir() and os.access(place, os.W_OK) else "memory"


def _check_kind(run: Run) -> None:
    """Whether experts of this run can be changed, by its adapter's config alone.

    Raises:
        ValueError: they cannot.
    """
    file = run.adapter_dir / "adapter_config.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if found.get("peft_type") != "MOPS" or (found.get("num_experts", 0) < 2 and not found.get("routes")):
        raise RunError(f"{run.path} was trained with method {run.config.get('method')!r}, which has no experts to "
                         "choose from: give a run of --method mops")  # fmt: skip
    wanted = {"experts": "keys_values", "gate_granularity": "expert", "gate_input": "instruction", "embedder": None}
    for name, value in wanted.items():
        if found.get(name, value) != value:
            raise RunError(f"{run.path} has {name}={found[name]!r}, and experts of such a run are not changed one by "
                             f"one: train with {name}={value!r}")  # fmt: skip


def one_at_a_time(change: Callable[[Path, Any], dict[str, Any]]) -> Callable[[Path, Any], dict[str, Any]]:
    """A change in a run's own place, alone in it from its first look: another one would be lost."""

    @wraps(change)
    def inner(run: Path, config: Any) -> dict[str, Any]:
        with alone(run) if config.in_place else nullcontext():
            return change(run, config)

    return inner
