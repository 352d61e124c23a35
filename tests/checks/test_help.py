"""Every option of every command says what it is, in its own words."""

from __future__ import annotations

import dataclasses
import pkgutil
import re
from importlib import import_module

import pytest
import tyro

from smartmops import options

COMMANDS = [
    each
    for module in (
        import_module(f"{options.__name__}.{found.name}") for found in pkgutil.iter_modules(options.__path__)
    )
    for name, each in vars(module).items()
    if name.endswith("Config") and dataclasses.is_dataclass(each) and each.__module__ == module.__name__
]


def help_of(action: object) -> str:
    """Without colours and what tyro adds about the default."""
    said = re.sub(r"\x1b\[[0-9;]*m|\[/?[a-z ]+\]", "", str(getattr(action, "help", None) or ""))
    return re.sub(r"\((?:default|required|optional|repeatable).*", "", said, flags=re.DOTALL).strip()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda each: each.__name__)
def test_every_option_has_help(command: type) -> None:
    helps = {action.dest: help_of(action) for action in tyro.extras.get_parser(command)._actions}
    assert helps.pop("help") and helps
    assert [name for name, said in helps.items() if not said] == []
    assert [name for name, said in helps.items() if said.endswith((";", ",", " its", " of", " the"))] == []
