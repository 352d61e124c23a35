"""Whether values that came from a file or another machine are of the types that were declared. Knows types alone."""

from __future__ import annotations

import types
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, get_args, get_origin, get_type_hints

NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "nothing",
         list: "a list", dict: "names and values"}  # fmt: skip


def fits(value: object, hint: Any) -> bool:
    """Whether a value is of a declared type; whole numbers serve as numbers, tuples as lists."""
    kind, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if kind is types.UnionType:
        return any(fits(value, each) for each in inner)
    if kind is list:
        return isinstance(value, list | tuple) and all(fits(each, inner[0]) for each in value)
    if kind is dict:
        return isinstance(value, Mapping) and all(
            fits(name, inner[0]) and fits(each, inner[1]) for name, each in value.items()
        )
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, hint)


def wrong(values: Mapping[str, object], kind: type) -> str | None:
    """What is wrong with the first of these values that is not of the type which `kind` declares; None if none is."""
    for name, hint in get_type_hints(kind).items():
        if name in values and not fits(values[name], hint):
            return f"{name}={values[name]!r:.80} is not {said(hint)}"
    return None


def said(hint: Any) -> str:
    """A type in words."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind is types.UnionType:
        return " or ".join(said(each) for each in inner)
    if kind is list:
        return f"a list, each {said(inner[0])}"
    return NAMES.get(kind or hint, getattr(hint, "__name__", str(hint)))
