"""Options of the commands that only read: `data`, and of finished runs `evaluate`, `inspect` and `report`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from smartmops.checks.folders import OutFile, near
from smartmops.checks.limits import Count, Options, Seed, Share, Text, Whole
from smartmops.options.training import Columns, Data, Model, Template, ValidationConfig


@dataclass(frozen=True)
class RunFolder:
    """A folder that a run was written to; with `finished`, to its end."""

    def wrong(self, value: Path) -> str | None:
        """As `limits.Limit`."""
        if not value.is_dir():
            what = "is a file" if value.exists() else "does not exist"
            return f" {what}: give a run folder, as written by --out{near(value, 'config.json')}"
        if not (value / "config.json").is_file():
            return " has no config.json, so it is no run folder: give a folder written by --out"
        if not (value / "metrics.json").is_file():
            return " is unfinished, it has no metrics.json: finish it with --resume, or give a finished run"
        return None


FinishedRun = Annotated[Path, RunFolder()]


@dataclass(kw_only=True)
class DataConfig(Options, ValidationConfig):
    """What `train` would read of DATA."""

    data: Annotated[Data, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]  # as `train --data`
    model: Model | None = None  # whose tokenizer and chat template are used; None: texts are not tokenised
    columns: Columns = ()  # FIELD=COLUMN where columns of the data have names of their own: response=answer
    template: Template = "auto"
    """chat: the tokenizer's own; plain: a frame; or a Jinja file. auto: chat if there is one"""
    max_length: Count = 512  # tokens; longer examples lose the end of their context
    limit: Count | None = None  # use only so many examples, drawn at random
    test_share: Share = 0.1  # of each category
    data_seed: Seed = 0  # of the draw and the split
    shown: Whole = 3  # examples shown as they are rendered, one of each task first


@dataclass
class EvaluateConfig(Options):
    """Perplexity of a run's adapter over response tokens, overall and per task; answers where asked for."""

    run: Annotated[Path, RunFolder(), tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]  # run folder
    data: Data | None = None  # None: the test split of the data the run was trained on
    columns: Columns = ()  # of --data: FIELD=COLUMN where they have names of their own, response=answer
    max_length: Count | None = None  # tokens; None: as in training
    batch_size: Count = 32  # examples
    answers: Whole = 0  # examples of each task answered, frozen and adapted, and scored: ROUGE-L and exact match
    answer_tokens: Count = 48  # at which an answer ends that has not ended itself


@dataclass
class InspectConfig(Options):
    """Which experts fire, and how much, for an instruction."""

    run: Annotated[Path, RunFolder(), tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]  # run folder
    text: Annotated[str, Text("an instruction")]  # instruction
    context: str = ""  # text that the instruction is about
    max_new_tokens: Count = 48  # at which the answer ends that has not ended itself


@dataclass
class ReportConfig(Options):
    """One self-contained report.html of one or several runs."""

    runs: Annotated[tuple[FinishedRun, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]  # run folders
    out: OutFile | None = None  # None: report.html in the first run folder

    def problems(self) -> Iterator[str]:
        """Whether there is a run."""
        if not self.runs:
            yield "0 run folders given: name at least one, such as runs/quickstart"
