"""The one record that passes between rooms. Text only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One supervised example of one task."""

    instruction: str
    context: str  # empty where the task has none
    response: str
    category: str = ""  # the task; empty where unknown
    source: str = ""  # who holds it: a client, a team, a file
