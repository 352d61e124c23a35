"""What can be made, what is there, what lies near a mistyped name; and nothing is left of asking."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from smartmops.checks.folders import Existing, WordOrFile, WordOrFolder, is_run, near, refused, unmade


def test_what_can_be_made_is_not_made(tmp_path: Path) -> None:
    assert unmade(tmp_path / "a" / "b") is None
    assert unmade(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_made_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert unmade(tmp_path / "file") == " is a file: choose a folder"
    assert f"{tmp_path / 'file'} is a file" in (unmade(tmp_path / "file" / "x" / "y") or "")
    assert "cannot be made" in (unmade(tmp_path / ("x" * 300)) or "")
    assert "cannot be made" in (unmade(Path(f"{tmp_path}/nu\0ll")) or "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be" in (unmade(tmp_path) or "") and "cannot be" in (unmade(tmp_path / "x") or "")
    tmp_path.chmod(0o700)


def test_a_word_is_never_taken_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    limit = WordOrFolder(("auto", "off"))
    assert limit.wrong("of") == ": choose auto, off, or a folder such as ./of"
    assert limit.wrong("") == ": choose auto, off, or a folder such as ./cache"
    assert limit.wrong("auto") is None and limit.wrong("./of") is None
    (tmp_path / "of").mkdir()
    assert limit.wrong("of") is None
    assert WordOrFile(("chat",), "a file").wrong("caht") == ": choose chat, or a file"


def test_a_mistyped_name_meets_its_neighbours(tmp_path: Path) -> None:
    for name in ("smol", "tiny-long", "notes", "smolle"):
        (tmp_path / name).mkdir()
    (tmp_path / "smol" / "config.json").write_text('{"arguments": {}}')
    (tmp_path / "smolle" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "smolly").touch()
    error = refused(tmp_path / "smoll", resume=True)
    assert isinstance(error, FileNotFoundError)
    assert f"mend the name (there is {tmp_path / 'smol'}), or leave --resume away" in str(error)
    assert near(tmp_path / "nowhere" / "x", is_run) == ""
    assert "notes" in (Existing("a folder", folder=True).wrong(tmp_path / "note") or "")


def test_a_lock_and_what_a_kill_left_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.json.1.tmp").touch()
    assert refused(tmp_path, resume=False) is None
    assert refused(tmp_path, resume=True) is None
