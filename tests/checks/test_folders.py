"""What can be made, what is there, what lies near a mistyped name; and nothing is left of asking."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest

from smartmops.checks.errors import FileTaken
from smartmops.checks.folders import (
    Existing,
    WordOrFile,
    WordOrFolder,
    Writable,
    expanded,
    growing,
    is_run,
    near,
    refused,
    unmade,
    whole,
)


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


@pytest.mark.parametrize(("before", "after"), [(0o600, 0o600), (0o664, 0o664), (None, 0o640)])
def test_a_file_that_takes_the_place_of_another_is_read_by_whom_that_was(
    before: int | None, after: int, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    if before is not None:
        out.touch()
        out.chmod(before)
    umask = os.umask(0o027)
    try:
        with growing(out) as file:
            file.write("row\n")
            assert stat.S_IMODE((tmp_path / "out.jsonl.partial").stat().st_mode) == after
    finally:
        os.umask(umask)
    assert stat.S_IMODE(out.stat().st_mode) == after and out.read_text() == "row\n"


def test_a_file_that_another_command_writes_is_taken(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with growing(out) as file:
        file.write("first\n")
        said = rf"^{out} is being written by another command, to .*: name another file$"
        with pytest.raises(FileTaken, match=said), growing(out):
            raise AssertionError
    assert out.read_text() == "first\n"


@pytest.mark.parametrize(("there", "said"), [(True, "is as it was"), (False, "was not made")])
def test_what_is_broken_off_says_what_to_do_with_it(
    there: bool, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "smartmops")
    out = tmp_path / "out.jsonl"
    if there:
        out.touch()
    with pytest.raises(KeyboardInterrupt), growing(out) as file:
        file.write("row\n")
        raise KeyboardInterrupt
    assert caplog.messages == [f"{out}.partial keeps what was written until then: before the same command again, move "
                               f"it away or delete it; {out} {said}"]  # fmt: skip


def test_a_file_that_is_write_protected_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.jsonl"
    out.touch(0o400)
    monkeypatch.setattr("os.access", lambda path, mode: path != out)  # root may write everywhere
    assert Writable().wrong(out) == " cannot be written: name another file"
    assert Writable().wrong(tmp_path / "new.jsonl") is None


@pytest.mark.parametrize("name", [".", "link", "gone", "empty", "new/deep"])
def test_a_folder_is_filled_wherever_it_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    for each in ("empty", "held"):
        (here / each).mkdir(parents=True)
    (here / "link").symlink_to(here / "held")
    (here / "gone").symlink_to(here / "nowhere")
    monkeypatch.chdir(here / "empty" if name == "." else here)
    for fails in (True, False):
        try:
            with whole(Path(name)) as fresh:
                (fresh / "deep").mkdir()
                (fresh / "deep" / "file").write_text("whole")
                if fails:
                    raise OSError(28, "No space left on device")
        except OSError as error:
            assert fails and error.errno == 28
            assert not Path(name).exists() or not list(Path(name).iterdir())
    assert [file.name for file in Path(name).iterdir()] == ["deep"]
    assert (Path.cwd() / name / "deep" / "file").read_text() == "whole"
    assert not list(tmp_path.rglob("*.tmp")) and (here / "link").is_symlink()


def test_a_file_may_be_called_as_a_home_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "~backup.jsonl").touch()
    assert Existing("a file").wrong("~backup.jsonl") is None
    assert expanded("~backup.jsonl").is_file() and expanded("~/a") == Path("/home/me/a")
