"""The command line: which command is meant, with which options, out of a file and of flags. Flags win.

Knows commands as functions of one config each. Runs none.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from functools import partial, wraps
from typing import Any, NoReturn, TypeVar, get_type_hints

import tyro

from smartmops.checks.errors import ConfigError

from .described import default_of, described, subcommands
from .examples import EXAMPLES
from .page import overview, page
from .reading import options_of
from .writing import version_of

FRAME = re.compile(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]+|^\s*[|+]-*|\|\s*$", re.MULTILINE)  # what tyro draws around its words

T = TypeVar("T")


def asked(commands: Mapping[str, Callable[..., Any]], words: Sequence[str]) -> tuple[Callable[[], Any], Any]:
    """The command that is meant, ready to be called, and its config; None where it has none.

    Raises:
        ConfigError: there is no such command or option, or a value is of another type.
        SystemExit: help or the version was asked for, and is printed.
    """
    name, *rest = words or ["--help"]
    if name in ("-h", "--help"):
        _shown(overview({key: _said(command) for key, command in commands.items()}, EXAMPLES))
    if name == "--version":
        own = version_of("smartmops", "of no version: it runs from its source, uninstalled")
        _shown(f"smartmops {own}")
    if name not in commands:
        close = get_close_matches(name, commands, 1)
        way_out = f"perhaps {close[0]} is meant" if close else f"choose {', '.join(commands)}"
        raise ConfigError(f"{name} is no command: {way_out}")
    command = commands[name]
    kind = get_type_hints(command).get("config")
    if {"-h", "--help"} & set(rest):
        if (action := _action(kind, rest)) is not None:
            examples = tuple(each for each in EXAMPLES[name] if f" {action[1]} " in f"{each} ") or EXAMPLES[name]
            _shown(page(f"{name} RUN {action[1]}", _said(action[2]), action[2], examples, True))
        _shown(page(name, _said(command, whole=True), kind or command, EXAMPLES[name], kind is not None))
    if kind is None:
        call: Callable[[], Any] = parsed(lambda: tyro.cli(
            _later(command), args=rest, prog=f"smartmops {name}", config=(tyro.conf.FlagCreatePairsOff,)))  # fmt: skip
        return call, None
    config = _config(kind, name, rest)
    return partial(command, config), config


def _action(kind: type | None, words: Sequence[str]) -> tuple[str, str, type] | None:
    """Of a command with actions of their own options: the option that chooses, and the word and config chosen."""
    known = {word: (each.name, word, config) for each in (described(kind) if kind is not None else ())
             for word, config in subcommands(each.hint)}  # fmt: skip
    return next((known[word] for word in words[1:] if word in known), None)  # the first is RUN, whatever it is called


def _config(kind: type, name: str, words: list[str]) -> Any:
    """Options of a file, where `--config` names one, under those that are typed."""
    try:
        return _made(kind, name, words)
    except ConfigError as error:
        if "--data" in words and re.match(r"Missing from .*: (MODEL|RUN)\b", str(error)):  # --data took it for a name
            raise ConfigError(f"{error}: write it in front of --data, which takes every word behind it") from None
        raise


def _made(kind: type, name: str, words: list[str]) -> Any:
    """`_config`, in the parser's own words where something is missing."""
    file, words = _file_in(words)
    if file is None:
        return parsed(lambda: tyro.cli(kind, args=words, prog=f"smartmops {name}", config=(
            tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)))  # fmt: skip
    action = _action(kind, words)
    given = options_of(file, kind if action is None else action[2])
    # tyro would make an option of each key that a mapping has by default, so mappings are filled in afterwards.
    tables = {name: given.pop(name) for name, value in list(given.items()) if isinstance(value, dict)}
    below = _below(kind, given if action is None else {action[0]: _below(action[2], given)})
    # A switch that the file turns on or off can be typed either way: --resume and --no-resume.
    made = parsed(lambda: tyro.cli(kind, args=words, prog=f"smartmops {name}", default=below,
                                   config=(tyro.conf.OmitArgPrefixes,)))  # fmt: skip
    for name, table in tables.items():
        if not getattr(made, name):
            setattr(made, name, table)
    made.from_file = given
    if action is not None:
        getattr(made, action[0]).from_file = given
    return made


def _below(kind: type, given: Mapping[str, Any]) -> Any:
    """A config of the options that a file gives, whose required ones may be missing still."""
    made: Any = object.__new__(kind)
    for each in fields(kind):
        setattr(made, each.name, given[each.name] if each.name in given else _default(each))
    return made


def _default(option: Field[Any]) -> Any:
    """As the config has it, or tyro's mark of what has to be typed."""
    found = default_of(option)
    return tyro.MISSING if found is MISSING else found


def _file_in(words: list[str]) -> tuple[str | None, list[str]]:
    """What `--config` names, and the other words.

    Raises:
        ConfigError: it names nothing, or comes twice.
    """
    file, left, rest = None, list[str](), iter(words)
    for word in rest:
        if word != "--config" and not word.startswith("--config="):
            left.append(word)
            continue
        if file is not None:
            raise ConfigError("--config is given twice: give one file")
        file = next(rest, "") if word == "--config" else word.removeprefix("--config=")
        if not file:
            raise ConfigError("--config names no file: give a YAML file of options")
    return file, left


def parsed(parse: Callable[[], T]) -> T:
    """What `parse` makes of the command line.

    Raises:
        ConfigError: what it has against the command line, in one line.
        SystemExit: it ended without a word.
    """
    written = io.StringIO()
    try:
        with contextlib.redirect_stderr(written):
            return parse()
    except SystemExit as stop:
        if stop.code and (words := _plain(written.getvalue())):
            raise ConfigError(words) from None
        raise


def _plain(drawn: str) -> str:
    """The words in a frame up to its first rule, and names that are offered instead; without the frame."""
    parts = re.split(r"[│|]?\s*[─-]{8,}\s*[│|╮╯]?\n", drawn.partition("\n")[2])
    words = [" ".join(FRAME.sub(" ", part).split()) for part in parts]
    offered = re.findall(r"^[│|]\s+(--[\w-]+)", next((part for part in parts if "Perhaps you meant" in part), ""), re.M)
    others = [f"perhaps {' or '.join(dict.fromkeys(offered))} is meant"] if offered else []
    said = ": ".join(filter(None, [next(filter(None, words), "").rstrip("."), *others]))
    pairs = "every name takes its learning rate after it, such as NAME 0.03 (in --methods, None is its default)"
    return said.replace("Failed to parse key-value pairs!", pairs)


def _later(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command that is called once its options are parsed, so that what it prints and raises is no parser's."""

    @wraps(command)
    def bound(*args: Any, **kwargs: Any) -> Any:
        return partial(command, *args, **kwargs)

    return bound


def _said(command: Callable[..., Any], whole: bool = False) -> str:
    """What a command's docstring says of it: its first paragraph, or all that stands before its arguments."""
    text = (command.__doc__ or "").split("Args:")[0] if whole else (command.__doc__ or "").split("\n\n")[0]
    return " ".join(text.split())


def _shown(text: str) -> NoReturn:
    print(text)
    raise SystemExit(0)
