"""What docs/engines.md tells a reader to type is what the commands take."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import tyro

from smartmops.handover import alone
from smartmops.options.finished.handover import ExportConfig

PAGE = (Path(__file__).parents[2] / "docs" / "engines.md").read_text()
LINES = [line for block in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("smartmops ")])
def test_every_command_line_is_taken(line: str) -> None:
    _, command, *words = shlex.split(line)
    assert command == "export"
    made = tyro.cli(ExportConfig, args=words, config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff))
    assert f"`{made.format}`" in PAGE


def test_programs_it_names_are_there() -> None:
    (line,) = [line for line in LINES if line.startswith("python ")]
    for name in (Path(shlex.split(line)[1]).name, "answer.py"):
        assert (Path(alone.__file__).with_name(name)).is_file()
