"""Rows of instructions without answers, as `generate --file` takes them. Knows no run and no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smartmops.checks.errors import DataError
from smartmops.rows.example import Example
from smartmops.rows.faults import Faults, shown

from .files import rows_of


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of instructions.

    Raises:
        DataError: some lines are no such rows, or there are none; all bad lines are named.
    """
    faults, rows = Faults(file), []
    for number, row in rows_of(file, faults):
        problem = _problem(row)
        if problem is None:
            rows.append(row)
        else:
            faults.add(number, problem)
    faults.check()
    if not rows:
        raise DataError(f"{file} holds no row: write one with an `instruction` a line")
    return rows


def _problem(row: Any) -> str | None:
    if not isinstance(row, dict):
        return f"{shown(row)} is no object: write one with an `instruction`"
    if not isinstance(row.get("instruction"), str) or not row["instruction"].strip():
        return f"`instruction` is {shown(row.get('instruction'))}: give a text"
    if not isinstance(row.get("context", ""), str):
        return f"`context` is {shown(row['context'])}: give a text or leave it out"
    try:
        Example(row["instruction"], row.get("context", ""), "")
    except ValueError as error:
        return str(error)
    return None
