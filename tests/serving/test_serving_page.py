"""What docs/serving.md tells a reader to type is what the commands take, and its client is answered."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import tyro

from smartmops.options.finished.serving import ChatConfig, GenerateConfig, ServeConfig
from smartmops.serving.answering import Answerer

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
CONFIGS = {"generate": GenerateConfig, "chat": ChatConfig, "serve": ServeConfig}
LINES = [line for block in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
         if line.startswith("smartmops ")]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_every_command_line_is_taken(line: str) -> None:
    _, command, *words = shlex.split(line)
    made = tyro.cli(CONFIGS[command], args=words, config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff))
    assert type(made) is CONFIGS[command]


@pytest.fixture
def url(answerer: Answerer) -> Iterator[str]:
    pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    from served import serving

    with serving(answerer) as served:
        yield served.url


def test_its_client_is_answered(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    exec(compile(code.replace("http://127.0.0.1:8000", url), "serving.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.startswith("['auto', 'base', 'apple', 'banana']\n") and "left_to_base" in printed
