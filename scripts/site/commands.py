"""docs/commands.md: every command and every option, as the parsers tell them. Knows the parsers; runs no command."""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Iterator
from typing import Any

import tyro

from smartmops import cli

PATH = "docs/commands.md"
COLOURS = re.compile(r"\x1b\[[0-9;]*m|\[/?(?:dim|bold|italic|red|cyan|bright_red)(?: [a-z_]+)*\]")
HELP = re.compile(r"^(?P<said>.*?)\s*\((?P<kind>default|required|optional|repeatable)(?::\s*(?P<value>.*?))?\)$", re.DOTALL)
HEAD = """# Commands

Written by `python scripts/site/write.py` from the parsers; a test says when it is stale. `smartmops COMMAND --help` shows the
same. What each returns in Python is on [the page of the API](api.md).
"""


def files() -> dict[str, str]:
    """The page, by its path."""
    lines = [HEAD, "| command | what it does |", "|---|---|"]
    parsers = {name: parser(name) for name in cli.COMMANDS}
    lines += [f"| [`{name}`](#{name}) | {first(each)} |" for name, each in parsers.items()]
    for name, each in parsers.items():
        lines += ["", *section(name, each)]
    return {PATH: "\n".join(lines) + "\n"}


def parser(name: str) -> argparse.ArgumentParser:
    """Of one command."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # tyro's, of the only way to a parser
        return tyro.extras.get_parser(cli.COMMANDS[name], prog=f"smartmops {name}",
                                      config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff))  # fmt: skip


def described(of: Any) -> list[str]:
    """Paragraphs of the function's docstring up to its first heading such as `Args:`."""
    text = re.split(r"\n\s*(?:Args|Returns|Raises):", of.__doc__ or "")[0]
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]


def first(each: argparse.ArgumentParser) -> str:
    """The first sentence of what a command says of itself."""
    return described(cli.COMMANDS[each.prog.split()[1]])[0]


def section(name: str, each: argparse.ArgumentParser) -> Iterator[str]:
    """Heading, usage, what it does, and a table of options for each group of them."""
    groups = [(group.title or "", [a for a in group._group_actions if a.dest != "help"])
              for group in each._action_groups]  # fmt: skip
    groups = [(title, actions) for title, actions in groups if actions]
    named = [word(a) for _, actions in groups for a in actions if not a.option_strings]
    needed = [f"{a.option_strings[-1]} {shape(a)}" for _, actions in groups for a in actions
              if a.option_strings and told(a)["kind"] == "required"]  # fmt: skip
    yield from (f"## {name}", "", "```text", " ".join([f"smartmops {name}", *named, *needed, "[options]"]), "```", "")
    for paragraph in described(cli.COMMANDS[name]):
        yield from (escaped(paragraph), "")
    for title, actions in groups:
        if len(groups) > 2 and title not in ("positional arguments", "options"):
            yield from (f"**{title}**", "")
        yield from ("| option | default | |", "|---|---|---|")
        yield from (row(action) for action in actions)
        yield ""


def row(action: argparse.Action) -> str:
    """One option: how it is typed, its default, what it is."""
    found = told(action)
    typed = word(action) if not action.option_strings else action.option_strings[-1]
    value = "required" if found["kind"] == "required" else f"`{found['value']}`" if found["value"] else ""
    values = shape(action)
    choices = f" `{values}`" if action.option_strings and values else ""
    return f"| `{typed}`{escaped(choices)} | {escaped(value)} | {escaped(found['said'])} |"


def told(action: argparse.Action) -> dict[str, str]:
    """What an option's help says, and its default apart."""
    text = " ".join(COLOURS.sub("", str(action.help or "")).split())
    match = HELP.match(text)
    found = match.groupdict() if match else {"said": text, "kind": "", "value": ""}
    return {name: value or "" for name, value in found.items()}


def word(action: argparse.Action) -> str:
    """A positional argument as it is typed."""
    return COLOURS.sub("", str(action.metavar or action.dest.upper()))


def shape(action: argparse.Action) -> str:
    """Of an option's value: its type, or what can be chosen."""
    return COLOURS.sub("", action.metavar if isinstance(action.metavar, str) else "").replace("{None}|", "None or ")


def escaped(text: str) -> str:
    """For a cell of a table."""
    return text.replace("|", "\\|")
