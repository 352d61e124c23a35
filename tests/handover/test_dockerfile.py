"""What the Dockerfile names is there: files, extras, commands and their options. Nothing is built."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from smartmops.cli import COMMANDS

ROOT = Path(__file__).parents[2]
FILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_copied_files_are_there_and_sent_to_the_builder() -> None:
    copied = [name for line in re.findall(r"^COPY (.*)$", FILE, re.MULTILINE) for name in line.split()[:-1]]
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == sent and all((ROOT / name).exists() for name in copied)
    assert PROJECT["readme"] in copied and set(PROJECT["license-files"]) <= set(copied), "the build asks for them"


def test_extras_and_the_entry_point_are_the_projects_own() -> None:
    extras = re.findall(r"EXTRAS=([\w,]+)", FILE)
    assert len(extras) >= 2
    assert {name for each in extras for name in each.split(",")} <= set(PROJECT["optional-dependencies"])
    (entry,) = re.findall(r'^ENTRYPOINT \["(.*)"\]$', FILE, re.MULTILINE)
    assert entry in PROJECT["scripts"]


@pytest.mark.parametrize("command", ["serve", "federate-server"])
def test_commands_it_shows_exist(command: str) -> None:
    (line,) = [line for line in FILE.splitlines() if f" {command} " in line and "docker run" in line]
    assert command in COMMANDS
    words = shlex.split(line.lstrip("# "))
    if command == "serve":
        from smartmops.options.finished.serving import ServeConfig

        names = {word[2:].replace("-", "_") for word in words[words.index(command) :] if word.startswith("--")}
        assert names <= set(ServeConfig.__dataclass_fields__)


def test_every_install_keeps_to_the_constraints() -> None:
    installs = re.findall(r"pip install ([^&\\]*)", FILE)
    assert len(installs) == 2 and all("--constraint constraints.txt" in each for each in installs)
    assert re.findall(r"^FROM python:(3\.\d+)", FILE, re.MULTILINE) == [PROJECT["requires-python"].removeprefix(">=")]
