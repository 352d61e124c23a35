"""Every wrong input is one line, exit status 2 and nothing written; scripts/sweep_wrong_inputs measures its time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from idle_inputs import ACTING
from smartmops import cli
from smartmops.settings.line import asked
from wrong_inputs import TRAIN, WRONG, prepare, spelled, there, words


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answered(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr("sys.argv", ["smartmops", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(("line", "said"), WRONG, ids=[line for line, _ in WRONG])
def test_it_is_answered_in_one_line_and_nothing_is_written(
    line: str, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = there(folder)
    error = answered(words(line, folder), monkeypatch, capsys)
    assert error.startswith("error: ") and error.count("\n") == 1 and spelled(said, folder) in error, error
    assert there(folder) == before


@pytest.mark.parametrize("line", ACTING)
def test_an_option_that_acts_is_not_called_idle(line: str, folder: Path) -> None:
    assert [*asked(cli.COMMANDS, words(line, folder))[1].idle()] == []


def test_several_are_answered_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"{TRAIN} --batch-size 0 --prompt-lr nan --activations memroy --out DIR/begun"
    error = answered(words(line, folder), monkeypatch, capsys)
    for said in ("--batch-size 0", "--prompt-lr nan", "--activations memroy", "holds an unfinished run"):
        assert said in error
    assert error.count("\n") == 4
    line = f"{TRAIN} --batch-size 900 --injection-layer 99"
    assert answered(words(line, folder), monkeypatch, capsys).count("\n") == 2, "what data and base say, too"


@pytest.mark.parametrize("line", [f"{TRAIN} --steps -5", f"{TRAIN} --batch-size 900", f"{TRAIN} --stepz 5"])
def test_it_is_answered_before_anything_heavy_is_imported(line: str, folder: Path) -> None:
    code = ("import sys; from smartmops.cli import main\n"
            "try:\n    main()\nfinally:\n    assert not {'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *words(line, folder)], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])})  # fmt: skip
    assert done.returncode == 2, done.stderr
