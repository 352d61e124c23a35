"""Rows that do not fit `--max-length`: how many, how long they are, what would help, and what is gone with them.

Knows lengths in tokens, and the task and source of an example. Knows no tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from smartmops.rows.example import Example

NAMED = 3  # tasks or sources that are gone, which are named; the others are counted


@dataclass(frozen=True)
class Limit:
    """How long a row may be.

    Attributes:
        asked: The `--max-length` that was asked for.
        positions: That the base has; None: its config does not say.
    """

    asked: int
    positions: int | None = None

    @property
    def tokens(self) -> int:
        """The smaller of the two."""
        return self.asked if self.positions is None else min(self.asked, self.positions)

    def cause(self, lengths: Sequence[int], of: int) -> str:
        """Of `of` rows some are too long, of these lengths without their contexts: said as a cause."""
        what = (
            f"--max-length {self.asked}" if self.tokens == self.asked else f"the {self.tokens} positions of this base"
        )
        return (f"{len(lengths)} of {of} rows are too long for {what} (without its context the shortest of them takes "
                f"{min(lengths)} tokens)")  # fmt: skip

    def none_fits(self, lengths: Sequence[int], of: int) -> str:
        """Cause and way out, where all of them are too long."""
        return f"{self.cause(lengths, of)}: {self.way_out(lengths)}"

    def way_out(self, lengths: Sequence[int]) -> str:
        """What would make the shortest of these rows fit."""
        if self.positions is not None and min(lengths) > self.positions:
            return f"shorten them, for this base has {self.positions} positions"
        return f"choose --max-length {min(lengths)} or more, or shorten them"


@dataclass(frozen=True)
class Left:
    """One example that is left out."""

    part: str  # train, test or validation
    task: str
    source: str
    tokens: int  # without its context


@dataclass
class Lost:
    """All examples of a data set that are left out for their length, and the tasks and sources that are gone with them.

    Attributes:
        limit: Of a row.
        examples: That are left out, part by part.
        tasks: By part, those of which it has no other example.
        sources: Those of which no part has any other example.
    """

    limit: Limit = field(default_factory=lambda: Limit(0))
    examples: list[Left] = field(default_factory=list)
    tasks: dict[str, list[str]] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, limit: Limit, parts: Mapping[str, tuple[Sequence[Example], Sequence[int], Mapping[int, int]]]) -> Lost:
        """Of the parts by name: their examples, the indices of those that fit, and the tokens of those that do not."""
        found = cls(limit)
        for name, (part, _, too_long) in parts.items():
            found.examples += [Left(name, part[i].category, part[i].source, count) for i, count in too_long.items()]
        fitting = {name: (part, kept) for name, (part, kept, _) in parts.items()}
        for name in parts:
            names = {each.task for each in found.examples if each.part == name}
            found.tasks[name] = sorted(_absent(names, {name: fitting[name]}, lambda example: example.category))
        names = {each.source for each in found.examples}
        found.sources = sorted(_absent(names, fitting, lambda example: example.source) - {""})
        return found

    def lengths(self, source: str | None = None, *, part: str | None = None) -> list[int]:
        """Tokens of what is left out, of one source or part where one is named."""
        return [each.tokens for each in self.examples
                if source in (None, each.source) and part in (None, each.part)]  # fmt: skip

    def said(self, data: str) -> Iterator[str]:
        """A line for each task that a part has lost, and for each source that is gone; of many, the first few."""
        for name, tasks in self.tasks.items():
            own = [each for each in self.examples if each.part == name]
            yield from self._gone(
                f"{data}, {name}" if data else name,
                "task",
                tasks,
                {task: [each.tokens for each in own if each.task == task] for task in tasks},
            )
        yield from self._gone(
            data or "all parts", "source", self.sources, {source: self.lengths(source) for source in self.sources}
        )

    def _gone(self, where: str, kind: str, names: Sequence[str], lengths: Mapping[str, Sequence[int]]) -> Iterator[str]:
        for name in names[:NAMED]:
            called = f"{kind} {name!r}" if name else "no task"
            own = lengths[name]
            yield f"{where}: nothing is left of {called}: {self.limit.cause(own, len(own))}: {self.limit.way_out(own)}"
        if len(names) > NAMED:
            yield f"{where}: nothing is left of {len(names) - NAMED} more {kind}s"


def _absent(
    names: set[str],
    parts: Mapping[str, tuple[Sequence[Example], Sequence[int]]],
    label: Callable[[Example], str],
) -> set[str]:
    """Those names that no example has which fits; looks no further than to the first of each."""
    missing = set(names)
    for part, kept in parts.values():
        for index in kept:
            if not missing:
                return missing
            missing.discard(label(part[index]))
    return missing
