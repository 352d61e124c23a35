"""DATA as it is named: one name or several, and what each of several is called. Reads nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from smartmops.rows.example import Example

from .files import SUFFIXES

Names = str | Path | Sequence[str | Path]


def names_of(data: Names) -> tuple[str, ...]:
    """Each name by itself."""
    return (str(data),) if isinstance(data, str | Path) else tuple(map(str, data))


def held(data: Names) -> str | tuple[str, ...]:
    """One name, or several as a config holds them."""
    return str(data) if isinstance(data, str | Path) else names_of(data)


def as_typed(data: Names) -> str:
    """The names as they are typed."""
    return " ".join(names_of(data))


def labels(names: Sequence[str]) -> list[str]:
    """A short word for each: a file's or folder's own name; as it was given where two would be called alike."""
    short = [_short(name) for name in names]
    return [own if short.count(own) == 1 else name for own, name in zip(short, names, strict=True)]


def labelled(examples: Iterable[Example], label: str) -> Iterator[Example]:
    """Examples with the label for a source where they have none, and for a task where they have none."""
    for example in examples:
        yield replace(example, category=example.category or label, source=example.source or label)


def _short(name: str) -> str:
    path = Path(name)
    return (path.stem if path.suffix in SUFFIXES else path.name) or name
