"""Rows that do not fit `--max-length`: how many, how long they are, and what would help.

Knows lengths in tokens. Knows no rows and no tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
