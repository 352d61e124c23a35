"""Options of the commands that only read: `data`, and of finished runs `evaluate`, `inspect` and `report`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from smartmops.checks.folders import OutFile, Writable, before, is_run, near
from smartmops.checks.limits import Count, Options, Seed, Share, Text, Whole, unused
from smartmops.options.training import Columns, Datas, Model, Rows, Template, ValidationConfig


@dataclass(frozen=True)
class RunFolder:
    """A folder that a run was written to; with `finished`, to its end."""

    def wrong(self, value: Path) -> str | None:
        """As `limits.Limit`."""
        if not value.is_dir():
            if (former := before(value)).is_dir():
                return f" was being changed by a command that was killed: it is {former} as it was before, rename that"
            what = "is a file" if value.exists() else "does not exist"
            return f" {what}: give a run folder, as written by --out{near(value, is_run)}"
        if not (value / "config.json").is_file():
            return " has no config.json, so it is no run folder: give a folder written by --out"
        if not is_run(value):
            return " is no run folder, its config.json is no run's: give a folder written by train, compare or federate"
        if not (value / "metrics.json").is_file():
            return " is unfinished, it has no metrics.json: finish it with --resume, or give a finished run"
        return None


FinishedRun = Annotated[Path, RunFolder()]


@dataclass(kw_only=True)
class DataConfig(Options, ValidationConfig):
    """What `train` would read of DATA."""

    data: Annotated[Datas, tyro.conf.Positional, tyro.conf.arg(metavar="DATA...")]
    """data as for `train`; `evaluate` takes what the run was tested on by default"""
    model: Model | None = None  # model whose tokenizer and chat template are used; without one, texts are not tokenised
    columns: Columns = ()  # FIELD=COLUMN where the data name their columns differently, such as response=answer
    template: Template = "auto"
    """how prompts are formatted: chat (the tokenizer's template), plain, a Jinja file, or auto (chat if there is)"""
    max_length: Count = 512  # tokens of an example; a longer one is shortened
    limit: Count | None = None  # number of examples to use, drawn at random; all of them by default
    test_share: Share = 0.1  # share of each category that is held out for testing
    data_seed: Seed = 0  # seed of the draw and of the split
    shown: Whole = 3  # number of rendered examples to show, one of each task first

    def idle(self) -> Iterator[str]:
        """As `Options`."""
        yield from unused(self, ("template", "max_length", "shown"), self.model is not None,
                          "is of tokens, which a model makes: give --model, or leave it away")  # fmt: skip


@dataclass
class EvaluateConfig(Options):
    """Perplexity of a run's adapter over response tokens, overall and per task; answers where asked for."""

    run: Annotated[Path, RunFolder(), tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]  # run folder
    data: Datas | None = None  # data as for `train`; `evaluate` takes what the run was tested on by default
    columns: Columns = ()  # FIELD=COLUMN where the data name their columns differently, such as response=answer
    max_length: Count | None = None  # tokens of an example; by default as in training
    rows: Rows | None = None
    """where texts and tokens are kept: memory, or a folder that they are mapped from; by default as in training"""
    batch_size: Count = 32  # examples in a batch
    answers: Whole = 0  # examples per task that both models answer, scored by ROUGE-L and exact match
    answer_tokens: Count = 48  # largest number of tokens of an answer
    suite: Annotated[str, Text("a folder of task files, or a task's name")] | None = None
    """tasks of EleutherAI's harness (extra lm-eval) to ask of base and run: a folder or file of its YAML, or a name"""
    suite_limit: Count | None = None  # examples of each of these tasks, the first ones; all of them by default

    def problems(self) -> Iterator[str]:
        """Whether one thing is measured."""
        given = {"--data": self.data, "--answers": self.answers or None, "--max-length": self.max_length,
                 "--rows": self.rows}  # fmt: skip
        for name, value in given.items():
            if self.suite is not None and value is not None:
                told = " ".join(value) if isinstance(value, tuple) else value
                yield (f"{name} {told} is not of --suite {self.suite}, whose tasks bring texts and measures of their "
                       "own: evaluate one after the other")  # fmt: skip
        if self.suite_limit is not None and self.suite is None:
            yield f"--suite-limit {self.suite_limit} is of tasks, and none are named: give --suite, or leave it away"

    def idle(self) -> Iterator[str]:
        """As `Options`."""
        yield from unused(self, ("answer_tokens",), self.answers > 0,
                          "is of answers, and none are asked for: give --answers, or leave it away")  # fmt: skip
        yield from unused(self, ("columns",), self.data is not None,
                          "is of --data, and the run's own are read as in training: give that, or "
                          "leave it away")  # fmt: skip


@dataclass
class InspectConfig(Options):
    """Which experts fire, and how much, for an instruction."""

    run: Annotated[Path, RunFolder(), tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]  # run folder
    text: Annotated[str, Text("an instruction")]  # instruction to answer
    context: str = ""  # text that the instruction refers to
    max_new_tokens: Count = 48  # largest number of tokens of an answer


@dataclass(kw_only=True)
class Answered(Options):
    """How a run in memory answers."""

    max_new_tokens: Count = 48  # largest number of tokens of an answer


@dataclass(kw_only=True)
class Question(Answered):
    """What a run in memory is asked."""

    text: Annotated[str, Text("an instruction")]  # instruction to answer
    context: str = ""  # text that the instruction refers to


@dataclass
class ReportConfig(Options):
    """One self-contained report.html of one or several runs."""

    runs: Annotated[tuple[FinishedRun, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]  # run folders
    out: OutFile | None = None  # file to write; by default report.html in the first run folder

    def problems(self) -> Iterator[str]:
        """Whether there is a run."""
        if not self.runs:
            yield "0 run folders given: name at least one, such as runs/quickstart"
        elif self.out is None and (said := Writable().wrong(self.page)) is not None:
            yield f"{self.page}{said.rpartition(':')[0]}: name another file with --out"

    @property
    def page(self) -> Path:
        """The file that is written."""
        return self.out or self.runs[0] / "report.html"
