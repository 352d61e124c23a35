"""What is wrong with a file, place by place, told all at once. Knows lines and words; knows no formats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from smartmops.checks.errors import DataError

SHOWN = 10  # places that a message names; the others are counted


class Faults:
    """Places of one file that cannot be read.

    Attributes:
        name: The file.
        unit: What its places are called: `line`, `row` or `instance`.
        count: How many there are.
    """

    def __init__(self, name: object, unit: str = "line") -> None:
        self.name, self.unit, self.count = str(name), unit, 0
        self._found: dict[str, list[int]] = {}

    def add(self, number: int, problem: str) -> None:
        """Note what is wrong in one place."""
        self.count += 1
        if self.count <= SHOWN:
            self._found.setdefault(problem, []).append(number)

    def check(self) -> None:
        """Go on only where nothing was noted.

        Raises:
            DataError: something was; places with the same problem stand together.
        """
        if self.count:
            told = [f"{places(self.unit, numbers)}: {problem}" for problem, numbers in self._found.items()]
            more = [f"and {self.count - SHOWN} more bad {self.unit}s"] if self.count > SHOWN else []
            raise DataError(f"{self.name}, {'; '.join([*told, *more])}")


def places(unit: str, numbers: list[int]) -> str:
    """`line 3`, or `lines 3, 5 and 8`."""
    *first, last = map(str, numbers)
    return f"{unit}s {', '.join(first)} and {last}" if first else f"{unit} {last}"


def some(names: Sequence[str], most: int = 5) -> str:
    """The first names of a list, and whether there are more."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def shown(value: Any) -> str:
    """A value from a file, short and on one line, as JSON would write it."""
    try:
        text = json.dumps(value, default=str)
    except (ValueError, TypeError, RecursionError):  # keys that are no text, or too many lists within lists
        text = type(value).__name__
    return text if len(text) <= 40 else f"{text[:37]}..."
