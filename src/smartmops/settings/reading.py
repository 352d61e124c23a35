"""Options out of a YAML file: nested by group or flat, every value read as the type of its option.

YAML 1.1 makes False of `no`, text of `1e-3` and 8 of `010`. Here the option says what its value is: only the text of
the file counts, so `no` is a word where a word is meant, `1e-3` a number, and `010` ten.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from smartmops.checks.errors import ConfigError
from smartmops.checks.folders import expanded

from .described import Described, bare, choices, described

NULL = ("", "~", "null", "Null", "NULL")
SWITCH = {**dict.fromkeys(("true", "yes", "on"), True), **dict.fromkeys(("false", "no", "off"), False)}
WHOLE = re.compile(r"[-+]?\d+(_\d+)*")
LARGEST = 10**6  # bytes of a file of options


class _Wrong(Exception):
    """What is wrong with the value at a place of the file."""

    def __init__(self, node: yaml.Node, said: str) -> None:
        super().__init__(said)
        self.node = node


def options_of(file: str | Path, kind: type) -> dict[str, Any]:
    """The options that a file gives for a config, by name; not yet held against their limits.

    Raises:
        ConfigError: it cannot be read, is no YAML, names an unknown option, or gives a value of another type; the
            message has file and line.
    """
    path = expanded(file)
    try:
        if path.stat().st_size > LARGEST:
            raise ConfigError(f"{file} is larger than {LARGEST} bytes: give a file of options")
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{file} cannot be read ({reason}): give a YAML file of options") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        why = getattr(error, "problem", None) or getattr(error, "reason", None) or "too deep"
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{file}{where}: no YAML ({why}): mend the line") from error
    try:
        return dict(_options(root, {each.name: each for each in described(kind)})) if root is not None else {}
    except _Wrong as wrong:
        raise ConfigError(f"{file}, line {wrong.node.start_mark.line + 1}: {wrong}") from None


def _options(root: yaml.Node, known: Mapping[str, Described]) -> Iterator[tuple[str, Any]]:
    groups = {each.group for each in known.values() if each.group}
    seen = set[str]()
    for key, value in _pairs(root, "options by name"):
        nested = key.value in groups and isinstance(value, yaml.MappingNode)
        for name, given in _pairs(value, "options by name") if nested else [(key, value)]:
            option = known.get(name.value)
            if option is None:
                raise _Wrong(name, f"unknown option {name.value!r}{_near(name.value, {*known, *groups})}")
            if nested and option.group != key.value:
                raise _Wrong(name, f"{name.value} stands under {key.value}, but is one of {option.group}: move it")
            if name.value in seen:
                raise _Wrong(name, f"{name.value} is given twice: leave one out")
            seen.add(name.value)
            yield name.value, _value(given, option.hint, name.value)


def _pairs(node: yaml.Node, what: str) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    if not isinstance(node, yaml.MappingNode):
        raise _Wrong(node, f"{_shown(node)} where {what} are meant: write `name: value`")
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _Wrong(key, f"{_shown(key)} for a name: write `name: value`")
        yield key, value


def _value(node: yaml.Node, hint: Any, name: str) -> Any:
    """What a node says, as the type that the option has."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _value(node, inner[0], name)
    if origin in (Union, types.UnionType):
        if isinstance(node, yaml.ScalarNode) and node.style is None and node.value in NULL:
            return None
        kinds = [each for each in inner if each is not type(None)]
        lists = [each for each in kinds if get_origin(bare(each)) is tuple]
        rest = [each for each in kinds if each not in lists]
        return _value(node, (lists if lists and isinstance(node, yaml.SequenceNode) else rest or lists)[0], name)
    if origin is tuple:
        if not isinstance(node, yaml.SequenceNode):
            raise _Wrong(node, f"{name} is {_shown(node)}: give a list, such as [{_shown(node)}]")
        return tuple(_value(each, inner[0], name) for each in node.value)
    if origin in (dict, Mapping):
        pairs = _pairs(node, f"the items of {name}")
        return {_value(key, inner[0], name): _value(value, inner[1], name) for key, value in pairs}
    if not isinstance(node, yaml.ScalarNode):
        raise _Wrong(node, f"{name} is {_shown(node)}: {choices(hint)}")
    try:
        return _scalar(node.value, hint)
    except ValueError:
        raise _Wrong(node, f"{name} is {_shown(node)}: {choices(hint)}") from None


def _scalar(text: str, hint: Any) -> Any:
    """A value of a type by its text.

    Raises:
        ValueError: the text is none of that type.
    """
    if get_origin(hint) is Literal:
        known = {str(each): each for each in get_args(hint)}
        return known[text] if text in known else _refuse(text)
    if hint is bool:
        return SWITCH[text.lower()] if text.lower() in SWITCH else _refuse(text)
    if hint is int:
        return int(text) if WHOLE.fullmatch(text) else _refuse(text)
    if hint is float:
        return float(text.removeprefix("+").replace(".inf", "inf").replace(".nan", "nan"))
    return hint(text)


def _refuse(text: str) -> Any:
    raise ValueError(text)


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value[:40])
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _near(name: str, names: set[str]) -> str:
    close = get_close_matches(name.replace("-", "_"), names, 1)
    return f": perhaps {close[0]} is meant" if close else ": leave it out"
