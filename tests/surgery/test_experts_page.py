"""What docs/experts.md tells a reader to type is what the commands take, and its Python runs."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import tyro

from smartmops.options.finished.surgery import AdviseConfig, ExpertsConfig

PAGE = (Path(__file__).parents[2] / "docs" / "experts.md").read_text()
CONFIGS = {"experts": ExpertsConfig, "advise": AdviseConfig}
LINES = [line for block in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("line", LINES)
def test_every_command_line_is_taken(line: str) -> None:
    program, command, *words = shlex.split(line)
    made = tyro.cli(CONFIGS[command], args=words, config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff))
    assert program == "smartmops" and type(made) is CONFIGS[command] and str(made.run).startswith("runs/")


def test_its_python_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "run", "runs/mine")
    shutil.copy2(folder / "new.jsonl", "new.jsonl")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    exec(compile(code, "experts.md", "exec"), {})
    assert Path("runs/more/metrics.json").is_file() and Path("runs/less/metrics.json").is_file()
