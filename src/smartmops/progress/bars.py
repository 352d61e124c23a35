"""Bars for work of a known length, and the console that all rooms print to. Knows nothing of the work."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.text import Text

# Where no terminal is, who reads the output breaks its lines, or searches them. Brackets are brackets, since names of
# tasks, answers and paths are others' words: what is styled is a `Text`.
console = Console(soft_wrap=not sys.stdout.isatty(), emoji=False, markup=False)
EVERY = 30.0  # seconds between two lines where there is no terminal

T = TypeVar("T")


def bold(words: object, colour: str = "") -> Text:
    """Words that stand out."""
    return Text(str(words), f"bold {colour}")


def duration(seconds: float) -> str:
    """As people say it: 12 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def track(items: Iterable[T], what: str, total: int | None = None, shown: bool = True) -> Iterator[T]:
    """The items, one after another; `what` is being done with them."""
    count = len(items) if total is None and isinstance(items, Sized) else total or 0
    with counted(what, count, shown) as done:
        for item in items:
            yield item
            done(1)


@contextmanager
def counted(what: str, total: int, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A function that takes note of so many more pieces of work, of `total` in all."""
    if not shown:
        yield lambda more: None
    elif console.is_terminal:
        with Progress(console=console, transient=True) as bar:
            line = bar.add_task(escape(what), total=total)
            yield lambda more: bar.advance(line, more)
    else:
        yield _Lines(what, total)


class _Lines:
    """A line when enough time has passed since the last one."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.started = self.said = time.monotonic()

    def __call__(self, more: int) -> None:
        self.done += more
        now = time.monotonic()
        if now - self.said < EVERY or self.done >= self.total:
            return
        left = (now - self.started) / self.done * (self.total - self.done)
        console.print(f"{self.what}: {self.done} of {self.total}, {duration(left)} left", highlight=False)
        self.said = now
