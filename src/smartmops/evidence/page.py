"""A page as blocks: what it says, once, for Markdown and for HTML alike. Knows no results and no meaning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Text:
    """A paragraph; `code` in backticks."""

    words: str


@dataclass(frozen=True)
class Table:
    """Heads and rows of text.

    Attributes:
        title: Above it; empty for none.
    """

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG and an SVG of the same name.

    Attributes:
        name: Of both files, without an ending, in the page's folder.
        words: What it shows.
    """

    name: str
    words: str


@dataclass(frozen=True)
class Gates:
    """Mean gate weights by task and expert, at one stage of training or several.

    Attributes:
        title: Above it.
        gates: As `gates.json` of a run holds them: experts, and weights by stage and task.
        name: Of its picture, as in `Picture`.
    """

    title: str
    gates: Mapping[str, Any]
    name: str


Block = Text | Table | Picture | Gates


@dataclass(frozen=True)
class Page:
    """One table or figure.

    Attributes:
        name: As `reproduce` calls it.
    """

    name: str
    title: str
    blocks: Sequence[Block]


def markdown(page: Page) -> str:
    """The page as Markdown; the same page gives the same bytes."""
    return "\n".join([f"# {page.title}\n", *(line for block in page.blocks for line in _lines(block))])


def _lines(block: Block) -> Iterator[str]:
    if isinstance(block, Text):
        yield block.words + "\n"
    elif isinstance(block, Table):
        if block.title:
            yield f"### {block.title}\n"
        yield "| " + " | ".join(block.heads) + " |"
        yield "|---" * len(block.heads) + "|"
        yield from ("| " + " | ".join(row) + " |" for row in block.rows)
        yield ""
    else:
        words = block.words if isinstance(block, Picture) else block.title
        yield f"![{words}]({block.name}.png)\n"
