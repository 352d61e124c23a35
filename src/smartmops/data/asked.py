"""Rows that ask something, with or without an answer, as `generate --file` takes them. Knows no run and no model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smartmops.checks.errors import DataError
from smartmops.rows.example import Example, opened
from smartmops.rows.faults import Faults, shown

from .files import rows_of
from .forms import history_of, messages_of

ASKED = ("instruction", "prompt")  # columns that may hold the question; else it is the last of these:
TALKS = ("messages", "conversations")
CONTEXT = ("context", "input")
TOLD = ("answer", "experts", "left_to_base")  # what a row is given


def read_rows(file: Path) -> list[tuple[dict[str, Any], Example]]:
    """The rows of a file of questions, as they stand there and as they are put.

    Raises:
        DataError: some lines are no such rows, or there are none; all bad lines are named.
    """
    faults, rows = Faults(file), []
    for number, row in rows_of(file, faults):
        try:
            rows.append((row, question_of(row)))
        except DataError as error:
            faults.add(number, str(error))
    faults.check()
    if not rows:
        raise DataError(f"{file} holds no row: write one with an `instruction` a line")
    return rows


def question_of(row: Any) -> Example:
    """What a row asks, read as training reads it: `context` or `input`, `system` and `history`, or messages.

    Raises:
        DataError: it asks nothing, holds no text where text must be, or a column that the answer would overwrite.
    """
    if not isinstance(row, dict):
        raise DataError(f"{shown(row)} is no object: write one with an `instruction`")
    if taken := next((name for name in TOLD if name in row), None):
        raise DataError(f"`{taken}` is what the answer is written to: call that column otherwise")
    _check_one(row)
    if talk := next((name for name in TALKS if name in row), None):
        system, history, question = opened(messages_of(row, talk))
        if question is None:
            raise DataError(f"`{talk}` ends with the assistant, so nothing is asked: leave the last answer out")
        if not question.strip():
            raise DataError(f"`{talk}` ends with a user who says nothing: give a text")
        return Example(question, "", "", system=system or _text(row, "system"), history=history)
    column = next((name for name in ASKED if name in row), ASKED[0])
    if not isinstance(row.get(column), str) or not row[column].strip():
        raise DataError(f"`{column}` is {shown(row.get(column))}: give a text")
    given = {name: text for name in CONTEXT if (text := _text(row, name))}
    if len(given) > 1:
        raise DataError("`context` and `input` both say something, and one is the context: join them")
    return Example(row[column], "".join(given.values()), "", system=_text(row, "system"), history=history_of(row))


def _check_one(row: Mapping[str, Any]) -> None:
    """Whether one column asks, or several the same."""
    asking = [name for name in (*TALKS, *ASKED) if row.get(name)]
    first, *others = asking or [""]
    for name in others:
        if row[name] != row[first] and not (first in TALKS and row[name] == _last(row[first])):
            raise DataError(f"`{first}` and `{name}` both ask something, and not the same: leave one out")


def _last(talk: Any) -> Any:
    """What a conversation ends with; None where it is none."""
    message = talk[-1] if isinstance(talk, list) and talk else None
    return message.get("content", message.get("value")) if isinstance(message, dict) else None


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None or isinstance(value, str):
        return value or ""
    raise DataError(f"`{column}` is {shown(value)}: give a text or leave it out")
