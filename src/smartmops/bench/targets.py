"""What a ratio should reach, and which ratios are measured together. Measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .sides import Lab


class Target(NamedTuple):
    """What a ratio should reach."""

    value: float | None  # None: nothing was promised
    at_least: bool
    what: str

    def met(self, found: float | None) -> bool | None:
        """Whether it does; None where nothing was promised or measured."""
        if self.value is None or found is None:
            return None
        return found >= self.value if self.at_least else found <= self.value

    def __str__(self) -> str:
        return "" if self.value is None else f"{'at least' if self.at_least else 'at most'} {self.value:g}"


Found = tuple[dict[str, float | None], dict[str, Any]]  # ratios (None: not measurable here), what they are made of


@dataclass(frozen=True)
class Section:
    """Ratios that share their sides."""

    name: str
    ratios: tuple[str, ...]
    measure: Callable[[Lab, Sequence[str]], Found]
