"""The examples run as they stand, at a size for tests, on the embedded model."""

from __future__ import annotations

import builtins
import json
import os
import runpy
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from shown import ROOT

EXAMPLES = ROOT / "examples"
SCRIPTS = {"train_and_chat.py", "hf_trainer.py", "federate.py", "serve_and_ask.py"}
Play = Callable[..., str]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where they write."""
    return tmp_path_factory.mktemp("examples")


@pytest.fixture
def play(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Play:
    """Runs a script with arguments; what it printed."""
    monkeypatch.chdir(place)

    def play(script: str, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *words])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return play


def test_all_of_them_are_run_here() -> None:
    assert {file.name for file in EXAMPLES.glob("*.py")} == SCRIPTS
    listed = (EXAMPLES / "README.md").read_text()
    assert all(name in listed for name in (*SCRIPTS, "tour.ipynb"))


def test_a_chat_after_training_on_chats(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["My tent has a scratch on its side.", ""])
    monkeypatch.setattr(builtins, "input", lambda _: next(lines))
    said = play("train_and_chat.py", "--model", "tiny", "--steps", "2", "--out", "run")
    assert all(f"{task}: perplexity" in said for task in ("mood", "order", "reply"))
    assert "model> " in said and "by " in said


@pytest.mark.parametrize("trainer", [[], ["--trl"]], ids=["transformers", "trl"])
def test_an_adapter_under_a_trainer_of_others(trainer: list[str], play: Play, place: Path) -> None:
    if trainer:
        pytest.importorskip("trl", reason="TRL is an extra")
    out = f"own{len(trainer)}"
    said = play("hf_trainer.py", "--model", "tiny", "--steps", "2", "--out", out, *trainer)
    assert "experts: mood, order, reply" in said and (place / out / "adapter/adapter_model.safetensors").exists()


def test_a_federation_in_one_process(play: Play) -> None:
    said = play("federate.py", "--model", "tiny", "--clients", "2", "--rounds", "1", "--local-steps", "1")
    assert "fedavg: perplexity" in said and "expert-weighted: perplexity" in said


def test_a_server_that_is_asked(play: Play, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai", reason="OpenAI's client asks the server")
    pytest.importorskip("fastapi", reason="serving is an extra")
    beside = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{beside}{os.pathsep}{os.environ['PATH']}")
    if not shutil.which("smartmops"):
        pytest.skip("no command smartmops: the package is not installed")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said = play("serve_and_ask.py", str(place / "run"), "--port", str(port), "--max-tokens", "3")
    assert "can be asked for: auto, base, mood, order, reply" in said
    assert said.count("left_to_base") == 2 and "base, as it comes:" in said


def test_the_notebook(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(place)
    for name, value in (
        ("MODEL", "tiny"),
        ("STEPS", "2"),
        ("OUT", "tour"),
        ("DATA", str(EXAMPLES / "data/support.jsonl")),
    ):
        monkeypatch.setenv(name, value)
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]
    scope: dict[str, object] = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None  # none that no test has seen
            exec(compile("".join(cell["source"]), f"tour.ipynb[{number}]", "exec"), scope)
    said = capsys.readouterr().out
    assert "mood" in said and "frozen |" in said and (place / "tour/report.html").exists()
