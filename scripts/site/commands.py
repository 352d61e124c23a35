"""docs/commands.md: every command and every option, as the command line knows them. Runs no command."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, get_type_hints

from smartmops import cli
from smartmops.settings.described import GROUPS, Described, described, of_function, subcommands
from smartmops.settings.examples import EXAMPLES

PATH = "docs/commands.md"
HEAD = """# Commands

Written by `python scripts/site/write.py` from the command line's own tables; a test says when it is stale. `smartmops COMMAND --help`
shows the same. Options may also stand in a YAML file that `--config` names; every run folder has one, and what is typed counts for
more. The same in Python is on [the page of the API](api.md).
"""


def files() -> dict[str, str]:
    """The page, by its path."""
    lines = [HEAD, "| command | what it does |", "|---|---|"]
    lines += [f"| [`{name}`](#{name}) | {escaped(paragraphs(each)[0])} |" for name, each in cli.COMMANDS.items()]
    for name, each in cli.COMMANDS.items():
        lines += ["", *section(name, each)]
    return {PATH: "\n".join(lines) + "\n"}


def paragraphs(of: Any) -> list[str]:
    """Of a docstring, up to its first heading such as `Args:`."""
    text = (inspect.getdoc(of) or "").split("Args:")[0].split("Returns:")[0]
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]


def section(name: str, command: Callable[..., Any]) -> Iterator[str]:
    """Heading, usage, what it does, options by group, examples."""
    kind = get_type_hints(command).get("config")
    options = list(described(kind)) if kind else list(of_function(command))
    within = {each.name: subcommands(each.hint) for each in options}
    typed = [each for each in options if not within[each.name]]
    yield from (f"## {name}", "", "```text", usage(name, typed, bool(any(within.values()))), "```", "")
    for paragraph in paragraphs(command):
        yield from (escaped(paragraph), "")
    yield from tables(typed)
    for word, each in (pair for found in within.values() for pair in found):
        own = list(described(each))
        yield from (f"### {name} RUN {word}", "", "```text", usage(f"{name} RUN {word}", own, False), "```", "")
        yield from (escaped(paragraphs(each)[0]), "", *tables(own))
    if EXAMPLES.get(name):
        yield from ("```", *EXAMPLES[name], "```")


def usage(name: str, options: list[Described], more: bool) -> str:
    """How a command is called, with what it cannot do without."""
    needed = [each.flag for each in sorted(options, key=lambda each: not each.positional) if each.required]
    return " ".join(["smartmops", name, *needed, "COMMAND ..." if more else "[options]"])


def tables(options: list[Described]) -> Iterator[str]:
    """A table for each group of options, what is given by its place first."""
    options = sorted(options, key=lambda each: not each.positional)
    for group, members in groupby(options, key=lambda each: None if each.positional else each.group):
        if group:
            yield from (f"**{group.capitalize()}**: {GROUPS[group]}.", "")
        yield from ("| option | default | |", "|---|---|---|")
        yield from (row(each) for each in members)
        yield ""


def row(each: Described) -> str:
    """One option: how it is typed, its default, what it is."""
    typed, _, value = each.flag.partition(" ")
    default = each.ending.removeprefix("(").removesuffix(")").removeprefix("default: ")
    shown = default if each.required else f"`{default}`" if default else ""
    return f"| `{typed}`{escaped(f' `{value}`' if value else '')} | {escaped(shown)} | {escaped(each.help)} |"


def escaped(text: str) -> str:
    """For a cell of a table."""
    return text.replace("|", "\\|")
