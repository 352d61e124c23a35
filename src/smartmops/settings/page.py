"""The help page of a command: how it is called, its options in groups, examples. Plain text, as wide as the terminal.

Knows how a page looks. Which commands there are, their examples say.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any

from .described import GROUPS, Described, described, of_function

LEFT, NARROW, WIDE = 27, 60, 110  # columns: where help begins; the least and the most a page is wide
CONFIG = ("--config FILE", "read options from a YAML file; those that are typed here count for more")


def overview(commands: Mapping[str, str], examples: Mapping[str, tuple[str, ...]]) -> str:
    """The page of `smartmops --help`: every command with its sentence, by subject; one example for each subject."""
    lines = ["usage: smartmops COMMAND ...", "", "Mixture of Prompts: one frozen language model, many tasks.", ""]
    for name, said in commands.items():
        lines += _entry(name, said)
    (first, *_) = examples.values()
    lines += ["", "`smartmops COMMAND --help` shows the options of a command, with examples.", "", _bold("examples:")]
    return "\n".join([*lines, *(f"  {line}" for line in (*first, *examples["train"][:1], *examples["chat"][:1]))])


def page(name: str, said: str, kind: type | Callable[..., Any], examples: tuple[str, ...], from_file: bool) -> str:
    """The help page of one command.

    Args:
        name: Of the command.
        said: What it does.
        kind: Its config, or a function whose docstring says what its arguments are.
        examples: Command lines.
        from_file: Whether it takes `--config`.
    """
    options = list(described(kind)) if isinstance(kind, type) else list(of_function(kind))
    needed = " ".join(each.flag for each in sorted(options, key=lambda each: not each.positional) if each.required)
    lines = [*_wrapped(f"usage: smartmops {name} {needed} [options]".replace("  ", " ")), "", *_wrapped(said), ""]
    for each in options:
        if each.positional:
            lines += _option(each)
    lines += [*_entry("-h, --help", "show this page"), *(_entry(*CONFIG) if from_file else [])]
    for group, members in groupby((each for each in options if not each.positional), key=lambda each: each.group):
        title = f"{group}: {GROUPS[group]}" if group else "options"
        lines += ["", _bold(title)]
        for each in members:
            lines += _option(each)
    return "\n".join([*lines, "", _bold("examples"), *(f"  {line}" for line in examples)])


def _option(each: Described) -> list[str]:
    return _entry(each.flag, f"{each.help} {each.ending}".strip())


def _entry(left: str, right: str) -> list[str]:
    """One item in two columns; a long left one stands in lines of its own."""
    words = textwrap.wrap(right, _width() - LEFT, break_on_hyphens=False) or [""]
    if len(left) + 4 > LEFT:
        return [*_wrapped(left, "  ", "      "), *(" " * LEFT + line for line in words)]
    return [f"  {left}".ljust(LEFT) + words[0], *(" " * LEFT + line for line in words[1:])]


def _wrapped(text: str, first: str = "", later: str = "") -> list[str]:
    spaced = text.replace(",", ", ") if "{" in text else text  # so that a long choice breaks between its words
    lines = textwrap.wrap(spaced, _width(), initial_indent=first, subsequent_indent=later, break_on_hyphens=False)
    return [line.replace(", ", ",") if "{" in text else line for line in lines]


def _width() -> int:
    return max(NARROW, min(shutil.get_terminal_size((100, 24)).columns, WIDE))


def _bold(text: str) -> str:
    return f"\x1b[1m{text}\x1b[0m" if sys.stdout.isatty() else text
