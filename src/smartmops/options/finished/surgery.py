"""Options of `experts` and `advise`: which expert of which run comes, goes or changes, and where that is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from smartmops.checks.errors import RunError
from smartmops.checks.folders import Existing, OutFolder, refused, unmade
from smartmops.checks.limits import Count, Fresh, Options, Rate, Seed, Share, Text, Whole, check, listed, unused
from smartmops.options.method import Unrelated
from smartmops.options.training import Columns, Data

from .reading import RunFolder
from .serving import experts_of

Run = Annotated[Path, RunFolder(), tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Name = Annotated[str, Text("an expert's name")]
New = Annotated[str, Fresh("an expert's name")]
Whose = Annotated[Name, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
PROMPT = "a text file with a system prompt"


@dataclass(frozen=True)
class Prompt:
    """A text file that is not blank."""

    def wrong(self, value: Path) -> str | None:
        """As `limits.Limit`."""
        if (said := Existing(PROMPT).wrong(value)) is not None:
            return said
        try:
            text = value.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return f" cannot be read: give {PROMPT}"
        return None if text.strip() else " is blank: write a system prompt"


@dataclass(kw_only=True)
class _Writing(Options):
    """Where the changed run is written."""

    out: OutFolder | None = None  # run folder; the run that is changed stays as it is
    in_place: Flag = False  # put the changed run in the place of the old one, at once

    def problems(self) -> Iterator[str]:
        """Whether there is one place."""
        if (self.out is None) == (not self.in_place):
            yield "--out DIR or --in-place: give one of them"

    def taken(self) -> RunError | None:
        """As `Options`."""
        return refused(self.out, False, resumes=False) if self.out is not None else None


@dataclass(kw_only=True)
class _Reading(Options):
    """How data are read, and how much of them."""

    columns: Columns = ()  # FIELD=COLUMN where columns of the data have names of their own: response=answer
    old: Data | None = None  # instructions that the run serves; None: the data it was trained on
    rows: Count = 200  # examples of the run's data, at most, that something is measured on

    @property
    def named(self) -> bool:
        """Whether data are named, whose columns may have names of their own."""
        return self.old is not None

    def idle(self) -> Iterator[str]:
        """As `Options`."""
        yield from super().idle()
        yield from unused(self, ("columns",), self.named, "is of data that are named, and the run's own are read as in "
                          "training: give --old, or leave it away")  # fmt: skip


@dataclass(kw_only=True)
class ListConfig(_Reading):
    """Each expert: its tasks, how much it is used, who is like it, and what its loss would cost."""


@dataclass(kw_only=True)
class Trial:
    """How long one expert is trained."""

    steps: Whole = 300  # optimiser steps
    batch_size: Count = 4  # examples
    relative_lr: Rate = 0.03  # Adam's rate, as a share of the root mean square of keys and values
    seed: Seed = 0  # of the start and the order


UNTRAINED = "is of training, and with --steps 0 there is none: leave one of them away"


@dataclass(kw_only=True)
class AddConfig(_Writing, _Reading, Trial):
    """Train one new expert, move one from another run, or make one of a written prompt; the others stay untouched."""

    data: Data | None = None  # examples of the new task
    source: Annotated[Annotated[str, Text("OTHER_RUN:NAME")] | None, tyro.conf.arg(name="from")] = None
    """OTHER_RUN:NAME, an expert of another run on the same base"""
    prompt: Annotated[Path, Prompt()] | None = None
    """a text file with a system prompt, whose effect becomes the expert"""
    inputs: Data | None = None  # questions for --prompt; None: the run's own training instructions
    name: New | None = None  # of the expert; None: the task of --data, the name at its source, or the prompt's file
    test_share: Share = 0.1  # of the new examples
    by_name: Flag = False  # the gate never chooses it: it answers where it is asked for by name
    answer_tokens: Count = 48  # of the base's answers to --inputs, at most
    questions: Count = 200  # of --inputs, at most

    def problems(self) -> Iterator[str]:
        """Whether there is one thing to add."""
        yield from super().problems()
        given = {"--data": self.data, "--from": self.source, "--prompt": self.prompt}
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1 and named != ["--data", "--from"]:
            yield f"{' and '.join(named) or 'nothing'} given: give --data, --from OTHER_RUN:NAME or --prompt"
        if self.inputs is not None and self.prompt is None:
            yield f"--inputs {self.inputs} are questions for --prompt: give that, or leave them away"
        if self.source is not None:
            yield from (f"--from {self.source}{said}" for said in unmoved(self.source))

    @property
    def named(self) -> bool:
        """As `_Reading`."""
        return super().named or self.data is not None or self.inputs is not None

    def idle(self) -> Iterator[str]:
        """As `Options`."""
        yield from super().idle()
        yield from unused(self, ("answer_tokens", "questions"), self.prompt is not None,
                          "is of questions for --prompt: give that, or leave it away")  # fmt: skip
        yield from unused(self, ("steps", "batch_size", "relative_lr"), self.source is None,
                          "is of training, and an expert of --from comes as it is: leave it away")  # fmt: skip
        yield from unused(self, ("batch_size", "relative_lr"), self.steps > 0, UNTRAINED)
        yield from unused(self, ("seed",), self.source is None or self.data is not None,
                          "is of the draw of --data, and of training: give --data, or leave it away")  # fmt: skip
        yield from unused(self, ("test_share",), self.data is not None,
                          "is of the examples of --data, and there are none: leave it away")  # fmt: skip


def unmoved(source: str) -> Iterator[str]:
    """Why no expert can be taken from OTHER_RUN:NAME, as it stands behind that."""
    other, _, name = source.rpartition(":")
    if not other or not name:
        yield ": give OTHER_RUN:NAME"
    elif (said := RunFolder().wrong(Path(other))) is not None:
        yield f": {other}{said}"
    elif (names := experts_of(Path(other))) and name not in names:
        yield f": {name!r} is no expert of {other}: choose {listed(names)}"


@dataclass(kw_only=True)
class DropConfig(_Writing, _Reading):
    """Take one expert out; what went to it goes where a gate without it sends it."""

    name: Whose  # expert that is taken out


@dataclass(kw_only=True)
class MergeConfig(_Writing, _Reading, Trial):
    """One expert in place of two, trained on what both were sent."""

    first: Annotated[Name, tyro.conf.Positional, tyro.conf.arg(metavar="A")]  # expert that goes
    second: Annotated[Name, tyro.conf.Positional, tyro.conf.arg(metavar="B")]  # the other one that goes
    name: New | None = None  # of the merged expert; None: A+B

    def problems(self) -> Iterator[str]:
        """Whether there are two."""
        yield from super().problems()
        if self.first == self.second:
            yield f"{self.first!r} cannot be merged with itself: name two experts"

    def idle(self) -> Iterator[str]:
        """As `Options`."""
        yield from super().idle()
        yield from unused(self, ("batch_size", "relative_lr", "seed"), self.steps > 0, UNTRAINED)


@dataclass(kw_only=True)
class RenameConfig(_Writing):
    """Another name for an expert."""

    name: Whose  # expert, as it is called now
    to: Annotated[New, tyro.conf.Positional, tyro.conf.arg(metavar="NEW")]  # as it is called from now on


@dataclass(kw_only=True)
class FreezeConfig(_Writing):
    """Further training leaves an expert as it is."""

    name: Whose  # expert that stays as it is
    off: Flag = False  # it trains again


@dataclass(kw_only=True)
class CalibrateConfig(_Writing, _Reading):
    """Set what is left to the base, from text of yours that the run should leave alone."""

    unrelated: Unrelated  # texts of no task, a paragraph each
    lose: Annotated[float, Share.__metadata__[0]] = 0.02  # of the run's own instructions, at most, left to the base


Change = (
    Annotated[ListConfig, tyro.conf.subcommand("list")]
    | Annotated[AddConfig, tyro.conf.subcommand("add")]
    | Annotated[DropConfig, tyro.conf.subcommand("drop")]
    | Annotated[MergeConfig, tyro.conf.subcommand("merge")]
    | Annotated[RenameConfig, tyro.conf.subcommand("rename")]
    | Annotated[FreezeConfig, tyro.conf.subcommand("freeze")]
    | Annotated[CalibrateConfig, tyro.conf.subcommand("calibrate")]
)


@dataclass(kw_only=True)
class ExpertsConfig(Options):
    """What is done to the experts of a run."""

    run: Run  # run folder
    do: tyro.conf.OmitSubcommandPrefixes[Change]
    """list, add, drop, merge, rename, freeze or calibrate; `experts RUN add --help` shows the options of one"""

    def problems(self) -> Iterator[str]:
        """What is wrong with the change."""
        if isinstance(self.do, _Writing) and self.do.in_place:
            for folder in (self.run, self.run.absolute().parent):  # the changed run is made beside it
                if (said := unmade(folder)) is not None:
                    yield f"--in-place: {folder}{said.rpartition(':')[0]}: write what changed elsewhere, with --out DIR"
                    break
        try:
            check(self.do)
        except ValueError as error:
            yield from str(error).splitlines()
        except OSError:
            pass  # `taken` says it
        yield from self._names()

    def idle(self) -> Iterator[str]:
        """As `Options`; asked once each option of the change is within its limits."""
        if not [*self.problems()]:
            yield from self.do.idle()

    def taken(self) -> RunError | None:
        """As `Options`."""
        return self.do.taken()

    def _names(self) -> Iterator[str]:
        """Whether experts that are named are there, and new names free."""
        names, do = experts_of(self.run), self.do
        given = [getattr(do, each, None) for each in ("first", "second")]
        given += [do.name] if isinstance(do, DropConfig | RenameConfig | FreezeConfig) else []
        for name in given:
            if name is not None and names and name not in names:
                yield f"{name!r} is no expert of {self.run}: choose one of {', '.join(names)}"
        fresh = do.to if isinstance(do, RenameConfig) else do.name if isinstance(do, AddConfig) else None
        if fresh is not None and fresh in names:
            yield f"{fresh!r} is an expert of {self.run} already: give another name"


@dataclass(kw_only=True)
class AdviseConfig(_Reading, Trial):
    """Whether a new task needs an expert of its own."""

    run: Run  # run folder
    data: Data  # examples of the task
    steps: Whole = 200  # optimiser steps of the trial; 0: no trial
    part: Count = 200  # examples, at most, that the trial sees
    test_share: Share = 0.2  # of the examples that it is measured on, and does not see

    @property
    def named(self) -> bool:
        """As `_Reading`."""
        return True

    def idle(self) -> Iterator[str]:
        """As `Options`."""
        yield from super().idle()
        yield from unused(self, ("batch_size", "relative_lr", "old"), self.steps > 0,
                          "is of the trial, and with --steps 0 there is none: leave one of them away")  # fmt: skip
