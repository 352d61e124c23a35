"""What is known of each option of a config: its group, its words of help, and how its value is typed.

An option's group is the `ABOUT` of the class that declares it; its help is the comment behind it, or the string below.
"""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from smartmops.checks.limits import hints_of, listed, typed

# Groups in the order of a help page, and what they hold.
GROUPS = {
    "run": "what is written where, and how often",
    "base": "the frozen base model",
    "data": "the examples, and what they are split into",
    "pruning": "which weights become zero",
    "quantisation": "in how many bits the weights are kept",
    "calibration": "the text that decides what a weight is worth",
    "method": "what is trained",
    "experts": "the groups of prompts",
    "gate": "what decides how much each expert is attended to",
    "preparation": "what comes before training: recovery prompts and the gate's start",
    "training": "optimiser steps, schedule and clipping",
    "rates": "learning rates of Adam",
    "validation": "training examples held out, so that the best state is kept",
    "comparison": "the methods and seeds that are compared",
    "partition": "how examples are shared out among clients",
    "rounds": "rounds of local training and averaging",
    "aggregation": "how the clients' updates become one",
    "privacy": "differential privacy of clients",
    "server": "where the server listens, and for whom it waits",
    "measuring": "what is measured, and how often",
    "model": "the random model that is measured on",
    "growth": "what --growth goes over",
}
METAVARS = {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True)
class Described:
    """One option.

    Attributes:
        name: As in Python.
        group: A key of `GROUPS`; None: its command has none.
        help: One sentence.
        hint: Its type, limits included.
    """

    name: str
    group: str | None
    help: str
    hint: Any
    default: Any

    @property
    def positional(self) -> bool:
        """Whether it is given by its place on the command line."""
        return self.nested or tyro.conf.Positional in _metadata(self.hint)

    @property
    def nested(self) -> bool:
        """Whether it is one of several configs, chosen by a word that has options of its own."""
        return bool(subcommands(self.hint))

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is MISSING

    @property
    def flag(self) -> str:
        """As it is typed, with a word for its value."""
        word = "ACTION" if self.nested else _arg(self.hint, "metavar") or metavar(self.hint)
        if self.positional:
            return word
        name = _arg(self.hint, "name") or self.name
        if word:
            return f"{typed(name)} {word}"
        return typed(f"no_{name}" if self.default is True else name)

    @property
    def ending(self) -> str:
        """What is said of its default; nothing of a switch, nor of what `None` means, which the help says."""
        if self.required:
            return "(required)"
        empty = self.default is None or self.default in ((), {}, "") or isinstance(self.default, bool)
        if empty:
            return ""
        shown = " ".join(map(str, self.default)) if isinstance(self.default, tuple) else self.default
        return f"(default: {shown})"


def subcommands(hint: Any) -> list[tuple[str, type]]:
    """Words and configs of an option that is a choice of configs; empty for any other."""
    parts = [get_args(each) for each in get_args(bare(hint)) if get_origin(each) is Annotated]
    return [(part[1].name, part[0]) for part in parts if is_dataclass(part[0]) and isinstance(part[0], type)]


def bare(hint: Any) -> Any:
    """A type without its limits."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


@cache
def described(kind: type) -> tuple[Described, ...]:
    """The options of a config, those of each group together, groups in the order of `GROUPS`."""
    hints, words = hints_of(kind), dict[str, str]()
    groups: dict[str, str | None] = {}
    for one in kind.__mro__:  # the class that declares an option first is the last to be seen
        for name, said in _comments(one).items() if "__dataclass_fields__" in vars(one) else ():
            words.setdefault(name, said)
            if about := vars(one).get("ABOUT"):
                groups[name] = about
    order = [*GROUPS, None]
    found = [Described(field.name, groups.get(field.name), _arg(hints[field.name], "help") or words[field.name],
                       hints[field.name], default_of(field)) for field in fields(kind)]  # fmt: skip
    return tuple(sorted(found, key=lambda each: order.index(each.group)))


def of_function(command: Callable[..., Any]) -> Iterator[Described]:
    """The arguments of a command that has no config; their words are those of its docstring."""
    said = dict(
        line.split(":", 1) for line in (inspect.getdoc(command) or "").split("Args:")[-1].splitlines() if ":" in line
    )
    words = {name.strip(): text.strip() for name, text in said.items()}
    hints = get_type_hints(command, include_extras=True)
    for name, each in inspect.signature(command).parameters.items():
        yield Described(name, None, words[name], hints[name], each.default)


def metavar(hint: Any) -> str:
    """A word for values of a type; empty for a switch, which has none."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _arg(hint, "metavar") or metavar(inner[0])
    if origin is Literal:
        return "{" + ",".join(map(str, inner)) + "}"
    if origin is tuple:
        return f"[{metavar(inner[0])} ...]"
    if origin in (dict, Mapping):
        return f"[{_short(inner[0])} {metavar(inner[1])} ...]"
    if type(None) in inner:
        (kind, *_) = [each for each in inner if each is not type(None)]
        return "{True,False}" if kind is bool else metavar(kind)
    return METAVARS.get(hint, "")


def _short(hint: Any) -> str:
    return "NAME" if metavar(hint).startswith("{") else metavar(hint)


def choices(hint: Any) -> str:
    """What may be given for a type, as the end of a sentence."""
    hint = bare(hint)
    if get_origin(hint) is Literal:
        return f"choose {listed(get_args(hint))}"
    return f"give {metavar(hint) or 'true or false'}"


def _metadata(hint: Any) -> tuple[Any, ...]:
    return hint.__metadata__ if get_origin(hint) is Annotated else ()


def _arg(hint: Any, name: str) -> str | None:
    """What `tyro.conf.arg` was told of an option."""
    found = [getattr(each, name, None) for each in _metadata(hint)]
    return next((each for each in found if isinstance(each, str)), None)


def default_of(field: Field[Any]) -> Any:
    """A fresh default of an option; `MISSING` where it has none."""
    return field.default if field.default_factory is MISSING else field.default_factory()


@cache
def _comments(kind: type) -> dict[str, str]:
    """The comment behind each field that a class declares, or the string below it; empty where there is none."""
    source = textwrap.dedent(inspect.getsource(kind))
    behind = {token.start[0]: token.string.lstrip("# ") for token in _tokens(source) if token.type == tokenize.COMMENT}
    (body,) = (node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    found = {}
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id != "ABOUT":
            below = after.value if isinstance(after, ast.Expr) else None
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            said = (
                below.value if isinstance(below, ast.Constant) else next((behind[i] for i in lines if i in behind), "")
            )
            found[node.target.id] = str(said).split("  # type:")[0].removeprefix("type: ignore[assignment]")
    return found


def _tokens(source: str) -> Iterator[tokenize.TokenInfo]:
    return tokenize.generate_tokens(io.StringIO(source).readline)
