"""Which examples are turns of one conversation, by what they say. Knows examples; knows no files."""

from __future__ import annotations

from collections.abc import Sequence

from .example import Example


def conversations(examples: Sequence[Example]) -> dict[str, list[list[int]]]:
    """By category, the indices of each conversation's turns, wherever they stand; others are one by themselves.

    A turn goes on from the one whose question and answer end its history, or the longest part of it that is there: of
    several that say the same, from the nearest before it that none goes on from yet.
    """
    began = _parents(examples) if any(example.history for example in examples) else {}
    found: dict[str, dict[int, list[int]]] = {}
    for index, example in enumerate(examples):
        first = index
        while first in began:
            first = began[first]
        found.setdefault(example.category, {}).setdefault(first, []).append(index)
    return {category: sorted(talks.values()) for category, talks in found.items()}


def _parents(examples: Sequence[Example]) -> dict[int, int]:
    """Of each turn that goes on from another, that one."""
    ending: dict[int, list[int]] = {}  # by a hash of all that was said up to its answer
    for index, example in enumerate(examples):
        ending.setdefault(_said(example, (*example.history, (example.instruction, example.response))), []).append(index)
    found, claimed = dict[int, int](), set[int]()
    for index, example in enumerate(examples):
        longest = range(len(example.history), 0, -1)
        if alike := next(filter(None, (ending.get(_said(example, example.history[:n])) for n in longest)), None):
            free = [each for each in alike if each not in claimed] or alike
            before = [each for each in free if each < index]
            found[index] = before[-1] if before else free[0]
            claimed.add(found[index])
    return found


def _said(example: Example, turns: tuple[tuple[str, str], ...]) -> int:
    return hash((example.category, example.system, turns))
