"""A frozen base beside its data, read, split and encoded: what every method, seed and client on them shares.

Knows which examples fit, and how they are rendered. Knows no adapter, trains nothing and writes no files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from smartmops.base import load_base, local
from smartmops.checks.errors import DataError, RunError
from smartmops.data.several import as_typed
from smartmops.data.tasks import splits
from smartmops.options.training import TaskConfig, ValidationConfig
from smartmops.progress.bars import console
from smartmops.rows.example import Example, of_examples
from smartmops.rows.faults import some
from smartmops.rows.stored import take
from smartmops.runs import ranks
from smartmops.runs.folder import CLIENT_FILES, TEST_SPLIT, Run
from smartmops.states.fingerprint import inputs_of
from smartmops.states.states import States
from smartmops.tokens.batches import Collator, Encoded, Encoding, NoneFits, encode_all
from smartmops.tokens.controls import controls_said
from smartmops.tokens.template import Template, check_template
from smartmops.tokens.unfit import Limit, Lost

from .early import check_base, check_hold_out, check_parts, check_split, check_tasks, warn_of_calibration
from .embedder import Embedder
from .held_out import hold_out, left_to_train


@dataclass
class Task:
    """A frozen base with the data it is to be adapted to: what every method compared in one sitting shares."""

    base: Any
    tokenizer: Any
    train: Sequence[Encoded]
    test: Sequence[Encoded]
    train_examples: Sequence[Example]
    test_examples: Sequence[Example]
    collator: Collator
    template: Template  # that texts are rendered with
    validation: Sequence[Encoded] = ()  # of the training split, not trained on
    embedder: Embedder | None = None
    states: States = field(default_factory=States)  # what the frozen half makes of the rows
    recovery: Float[Tensor, "R hidden"] | None = None  # frozen prompts at the input, once they are trained
    limit: Limit = field(default_factory=lambda: Limit(0))  # of a row's length
    held_out: Mapping[str, int] = field(default_factory=dict)  # training examples left out by `hold_out`, by source
    lost: Lost = field(default_factory=Lost)  # examples that are too long for it
    test_split: str = ""  # fingerprint of the test examples as they were drawn; empty where they were given

    @classmethod
    def load(cls, config: TaskConfig, base: Any = None, tokenizer: Any = None) -> Task:
        """Read, split and encode the data, and load the base unless given; says what was cut.

        Raises:
            DataError: `hold_out` is no category of the training split, or the only one; the data do not fit.
        """
        train, test = splits(config.data, config.limit, config.test_share, config.data_seed, config.validation,
                             config.folder, config.columns)  # fmt: skip
        if config.hold_out is not None:
            check_hold_out(config.hold_out, {example.category for example in train})
        warn_of_calibration(config, local(config.model), console)
        check_template(config.template)
        check_parts(config.data, len(train), len(test))
        if base is None:
            check_base(config, local(config.model))
            check_tasks(config, train)
            check_split(config, left_to_train(train, config), len(test), ranks.world())
            base, tokenizer = load_base(config.model, config.dtype)
        if alone := sorted({example.category for example in train} - {example.category for example in test}):
            console.print(f"no test example for {len(alone)} of the tasks, which have one example each, or one "
                          f"conversation, to train on: {some(alone)}")  # fmt: skip
        found = cls.of(base, tokenizer, train, test, config)
        found.test_split = of_examples(test)
        return found

    @classmethod
    def of(
        cls, base: Any, tokenizer: Any, train: Sequence[Example], test: Sequence[Example], config: TaskConfig,
        tested: str = "test",
    ) -> Task:  # fmt: skip
        """Encode examples for a base; either part may be empty. What does not fit is left out, and said.

        Examples of the category `hold_out` are left out of the training part only. `tested` is what `test` is called.
        """
        held_out = Counter[str]()
        if config.hold_out is not None:
            held_out.update(example.source for example in train if example.category == config.hold_out)
            train = take(train, (i for i, example in enumerate(train) if example.category != config.hold_out))
        held: Sequence[Example] = []
        if isinstance(config, ValidationConfig):
            train, held = hold_out(train, config, config.data_seed)
        limit = Limit(config.max_length, getattr(base.config, "max_position_embeddings", None))
        if limit.tokens < config.max_length:
            console.print(f"--max-length {config.max_length}: this base has {limit.tokens} positions, so that is the "
                          "limit")  # fmt: skip
        template = Template.of(config.template, tokenizer)
        embedder = Embedder(config.embedder) if config.embedder else None
        rows: list[Sequence[Encoded]] = []
        kept: list[Sequence[Example]] = []
        parts: dict[str, tuple[Sequence[Example], Sequence[int], Mapping[int, int]]] = {}
        for name, part in (("train", train), (tested, test), ("validation", held)):
            if not part:
                rows.append([])
                kept.append([])
                continue
            encoding = _encoded(name, part, tokenizer, limit, embedder, config.folder, template)
            kept.append(take(part, encoding.kept))
            rows.append(encoding.rows)
            parts[name] = part, encoding.kept, encoding.too_long
        lost = Lost.of(limit, parts)
        for said in lost.said(as_typed(getattr(config, "clients_data", None) or config.data)):
            console.print(said)
        return cls(base, tokenizer, rows[0], rows[1], kept[0], kept[1], Collator(tokenizer), template, rows[2],
                   embedder, States(config.activations), limit=limit, held_out=held_out,
                   lost=lost)  # fmt: skip

    @property
    def counts(self) -> dict[str, int]:
        """How many rows there are of each part."""
        return {name: len(getattr(self, name)) for name in ("train", "validation", "test")}

    def feed(self, model: Any) -> tuple[Sequence[Any], Callable[[Sequence[Any]], dict[str, Any]]]:
        """The training rows as a data set and its collator for `fit`."""
        return self.states.feed(model, self.train, self.collator)


def same_inputs(run: Run, task: Task, unrelated: Path | None = None) -> None:
    """Whether a resumed run has the base, template, data and text of no task that it was started with.

    Raises:
        RunError: it has others.
    """
    with ranks.turn() as mine:
        if mine:
            text = {} if unrelated is None else {"file of --unrelated": of_examples([unrelated.read_bytes()])}
            run.same_inputs(inputs_of(task) | text)


def same_test_split(run: Run, now: str) -> None:
    """Whether the data of a finished run still give the test examples that it was measured on; `now` tells theirs.

    Raises:
        RunError: they give others, among which may be some that the run was trained on.
    """
    then = run.read_inputs().get(TEST_SPLIT, now)
    if then != now:
        raise RunError(f"the data of {run.path} have changed since it was trained (test split {then}, now {now}; or "
                       "their tasks are called otherwise, as where files of several folders are called alike), so "
                       "what is drawn to test on may be what it was trained on: bring back the data of then, or name "
                       "others (evaluate --data, experts --old)")  # fmt: skip


def same_client_files(run: Run, now: str) -> None:
    """Whether the files of a finished federation's clients are those that it was trained on; `now` tells them.

    Raises:
        RunError: they are others.
    """
    then = run.read_inputs().get(CLIENT_FILES, now)
    if then != now:
        raise RunError(f"the files of {run.path}'s clients have changed since it was trained (fingerprint {then}, now "
                       f"{now}): bring back the files of then")  # fmt: skip


def _encoded(name: str, part: Sequence[Example], tokenizer: Any, limit: Limit, *how: Any) -> Encoding:
    """`encode_all` of one part of the data, called `name`; says what was cut.

    Raises:
        DataError: as `encode_all`; where nothing fits, with the option and what would help.
    """
    try:
        encoding = encode_all(part, tokenizer, limit.tokens, *how)
    except NoneFits as error:
        raise DataError(f"{name}: {limit.none_fits(error.lengths, len(part))}") from error
    console.print(f"{name}: {len(encoding.rows)} examples; {encoding.truncation}")
    for said in controls_said(name, part, tokenizer):
        console.print(said)
    return encoding
