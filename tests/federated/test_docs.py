"""What docs/federation.md tells a reader to type is what the commands take."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import tyro

from smartmops import cli
from smartmops.cli import ReportConfig
from smartmops.deployment.client import ClientConfig
from smartmops.deployment.keys import KeysConfig
from smartmops.deployment.server import ServerConfig
from smartmops.federated.federate import FederateConfig

PAGE = (Path(__file__).parents[2] / "docs" / "federation.md").read_text()
CONFIGS = {"federate": FederateConfig, "federate-keys": KeysConfig, "federate-server": ServerConfig,
           "federate-client": ClientConfig, "report": ReportConfig}  # fmt: skip
LINES = [line for block in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
         if line.startswith("smartmops ")]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_every_command_line_is_taken(line: str) -> None:
    _, command, *words = shlex.split(line.replace(" ... ", " tiny --data office --out run "))
    made = tyro.cli(CONFIGS[command], args=words, config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff))
    assert type(made) is CONFIGS[command]


def test_every_option_that_is_named_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in CONFIGS:
        monkeypatch.setattr(sys, "argv", ["smartmops", command, "--help"])
        with pytest.raises(SystemExit):
            cli.main()
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    named = set(re.findall(r"--[a-z][a-z-]*", PAGE))
    assert len(LINES) >= 7 and len(named) > 20
    assert named <= known, named - known
