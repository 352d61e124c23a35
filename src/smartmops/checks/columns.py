"""Which column of the data holds what: `FIELD=COLUMN`. Knows words; knows no files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from smartmops.checks.errors import ConfigError, WrongType

BUILT_IN = ("office", "dolly", "superni")  # DATA whose columns are known
FIELDS = ("instruction", "context", "response", "category", "source", "system", "history", "messages")


def chosen_columns(chosen: Sequence[str]) -> dict[str, str]:
    """`instruction=question response=answer` as a mapping.

    Raises:
        ConfigError: one of them has no `=`, names nothing that an example has, or names it twice.
    """
    found: dict[str, str] = {}
    if isinstance(chosen, str | Mapping) or not isinstance(chosen, Iterable):
        raise WrongType(f"--columns {chosen!r}: give a list of FIELD=COLUMN, such as response=answer")
    for each in chosen:
        if not isinstance(each, str):
            raise WrongType(f"--columns {each!r}: write FIELD=COLUMN, such as response=answer")
        field, equals, column = each.partition("=")
        field = "category" if field == "task" else field
        if not equals or not column or field not in FIELDS:
            raise ConfigError(f"--columns {each}: write FIELD=COLUMN, such as response=answer; FIELD is one of "
                              f"{', '.join(FIELDS)}")  # fmt: skip
        if field in found:
            raise ConfigError(f"--columns {each}: {field} is read from {found[field]} already: choose one")
        found[field] = column
    return found


@dataclass(frozen=True)
class FieldsOfColumns:
    """FIELD=COLUMN, each field once."""

    def wrong(self, value: tuple[str, ...]) -> str | None:
        """As `limits.Limit`."""
        try:
            chosen_columns(value)
        except ValueError as error:
            said = str(error).removeprefix("--columns ")  # which of several it is
            return f": {said.removeprefix(f'{next(iter(value))}: ') if len(value) == 1 else said}"
        return None
