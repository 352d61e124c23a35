"""What many texts begin with (the definition of a task, a system prompt), found by their tokens.

Knows token ids. Knows no model and no states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

LEAST = 16  # tokens: a shorter beginning saves less than it costs to carry


@dataclass(frozen=True)
class Openings:
    """Beginnings that are worth computing once, and which of them each text goes on from (None: none)."""

    tokens: list[list[int]]
    of: list[int | None]


@dataclass
class _Node:
    """Sorted texts from `first` on that share `depth` tokens, and the best way to divide those seen so far."""

    depth: int
    first: int
    saved: int = 0  # tokens
    groups: list[tuple[int, int, int]] = field(default_factory=list)  # first, behind the last, tokens

    def closed(self, end: int, least: int) -> _Node:
        """With texts up to `end`: one beginning for all, where that saves more than the ones of its parts."""
        whole = (end - self.first - 1) * self.depth if self.depth >= least else 0
        if whole > self.saved:
            self.saved, self.groups = whole, [(self.first, end, self.depth)]
        return self

    def take(self, part: _Node) -> None:
        """What was found within."""
        self.saved += part.saved
        self.groups += part.groups


def openings(texts: Sequence[Sequence[int]], least: int = LEAST) -> Openings:
    """The beginnings, none within another, that save the most tokens if all texts that begin with one go on from it.

    A beginning of d tokens that n texts go on from saves (n - 1) d. Texts that share a beginning lie together once
    sorted, and two such sets lie apart or within each other, so that each is held against the best of its parts.

    Args:
        texts: Token ids.
        least: Tokens that a beginning has at least.
    """
    order = sorted(range(len(texts)), key=lambda i: list(texts[i]))
    stack = [_Node(0, 0)]
    for end in range(1, len(order) + 1):
        depth = _shared(texts[order[end - 1]], texts[order[end]]) if end < len(order) else 0
        first, done = end - 1, _Node(0, 0)
        while stack[-1].depth > depth:
            done = stack.pop().closed(end, least)
            first = done.first
            if stack[-1].depth >= depth:
                stack[-1].take(done)
                done = _Node(0, 0)
        if stack[-1].depth < depth:
            stack.append(_Node(depth, first))
        stack[-1].take(done)
    of: list[int | None] = [None] * len(texts)
    for number, (first, end, _) in enumerate(stack[0].groups):
        for i in order[first:end]:
            of[i] = number
    return Openings([list(texts[order[first]][:depth]) for first, _, depth in stack[0].groups], of)


def _shared(one: Sequence[int], two: Sequence[int]) -> int:
    """How many tokens both begin with."""
    unlike = (i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    return next(unlike, min(len(one), len(two)))
