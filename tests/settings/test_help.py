"""Every option of every command says what it is, in its own words."""

from __future__ import annotations

import dataclasses
import pkgutil
from importlib import import_module

import pytest

from smartmops import options
from smartmops.settings.described import described

COMMANDS = [
    each
    for module in (
        import_module(f"{options.__name__}.{found.name}") for found in pkgutil.iter_modules(options.__path__)
    )
    for name, each in vars(module).items()
    if name.endswith("Config") and dataclasses.is_dataclass(each) and each.__module__ == module.__name__
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda each: each.__name__)
def test_every_option_has_help(command: type) -> None:
    helps = {each.name: each.help for each in described(command)}
    assert helps and [name for name, said in helps.items() if not said.strip()] == []
    assert [name for name, said in helps.items() if said.endswith((";", ",", " its", " of", " the"))] == []
