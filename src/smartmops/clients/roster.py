"""Who takes part, by the names that the operator knows, and who is left out because nothing comes from it any more.

Knows names and reasons. Knows no arrays and no network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SHOWN, LONGEST = 3, 300  # clients that a line names; characters of a reason in it


@dataclass(frozen=True)
class LeftOut:
    """Since which round a client is not asked, and why."""

    since: int
    reason: str


@dataclass
class Roster:
    """The clients of a run.

    Attributes:
        names: By number, of all that belong.
        left_out: Those of whom nothing came when they were last asked, until they are heard from again. Not part of a
            checkpoint: whoever resumes a run greets every client before its first round.
    """

    names: Mapping[int, str]
    left_out: dict[int, LeftOut] = field(default_factory=dict)

    @property
    def members(self) -> list[int]:
        """Numbers of all that belong."""
        return sorted(self.names)

    @property
    def there(self) -> list[int]:
        """Numbers of those that are not left out."""
        return [client for client in self.members if client not in self.left_out]

    def name(self, client: int) -> str:
        """In quotes, since names hold blanks."""
        return repr(self.plain(client))

    def plain(self, client: int) -> str:
        """The name alone; of a number that is nobody's, that number."""
        return self.names.get(client, f"number {client}")

    def heard(self, clients: Iterable[int]) -> list[str]:
        """These have answered; names of those that were left out until now."""
        return [self.name(client) for client in sorted(clients) if self.left_out.pop(client, None)]

    def missed(self, number: int, reasons: Mapping[int, str]) -> list[str]:
        """Nothing came of these in round `number`; a line about each that is left out from now on."""
        fresh = [client for client in sorted(reasons) if client not in self.left_out]
        self.left_out |= {client: LeftOut(number, reasons[client]) for client in fresh}
        return [f"{self.name(client)} is left out until it is heard from again: {short(reasons[client])}"
                for client in fresh]  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        """Who is left out, as the log keeps it."""
        return [{"client": client, "name": self.names[client], "since": found.since, "reason": found.reason}
                for client, found in sorted(self.left_out.items())]  # fmt: skip


def listed(what: Sequence[str]) -> str:
    """The first few of `what` in brackets, and how many there are beside them; nothing of nothing."""
    more = [f"and {len(what) - SHOWN} more"] if len(what) > SHOWN else []
    return f" ({'; '.join([*what[:SHOWN], *more])})" if what else ""


def short(reason: str) -> str:
    """On one line of a terminal: a client may send any text for a reason."""
    line = "".join(each if each.isprintable() else "?" for each in " ".join(reason.split()))
    return line if len(line) <= LONGEST else line[:LONGEST] + "..."
