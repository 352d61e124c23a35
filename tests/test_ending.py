"""A kill, Ctrl-C and a lack of memory end a command with one line, a status, and a way on."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from smartmops.checks import errors
from smartmops.checks.errors import QuorumLost
from smartmops.checks.resources import is_full, lower, translated
from smartmops.ending import ending, said
from smartmops.options.compression import CompressConfig
from smartmops.options.training import TrainConfig
from smartmops.settings.line import parsed
from smartmops.settings.writing import versions


def ended(config: Any, act: Any, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    with pytest.raises(SystemExit) as stopped, ending(config):
        act()
    return stopped.value.code, capsys.readouterr().err


def raises(error: BaseException) -> Any:
    def act() -> None:
        raise error

    return act


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(model="tiny", data="office", out=tmp_path / "run", batch_size=64)


def test_a_kill_and_ctrl_c_say_how_to_go_on(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert ended(config, lambda: os.kill(os.getpid(), signal.SIGTERM), capsys) == (
        143, "stopped: by SIGTERM: nothing was begun, so nothing is kept\n")  # fmt: skip
    config.out.mkdir()
    (config.out / "config.json").touch()
    status, line = ended(config, raises(KeyboardInterrupt()), capsys)
    assert status == 130 and line.count("\n") == 1
    assert "by Ctrl-C: the same command with --resume goes on, to the same result" in line
    half = CompressConfig(model="tiny", out=config.out.with_name("small"))
    assert "nothing was begun" in ended(half, raises(KeyboardInterrupt()), capsys)[1]
    (config.out.parent / "small.partial").mkdir()
    assert "--resume goes on" in ended(half, raises(KeyboardInterrupt()), capsys)[1]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate "
                 "91136000000 bytes."),
], ids=lambda error: type(error).__name__)  # fmt: skip
def test_a_lack_of_memory_says_what_to_lower(
    error: Exception, config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    status, line = ended(config, raises(error), capsys)
    assert status == 2 and line.count("\n") == 1
    assert line.startswith("error: out of memory") and "lower --batch-size (now 64) or --max-length (now 512)" in line
    assert "--dtype bfloat16" in line and "--activations off" in line


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), ValueError("a bug of ours"), KeyError("a"),
                                   BrokenPipeError("a client hung up"), AssertionError()])  # fmt: skip
def test_a_bug_shows_its_traceback_and_asks_for_a_report(
    error: Exception, config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = ended(config, raises(error), capsys)
    assert status == 1 and "Traceback (most recent call last)" in said and type(error).__name__ in said
    assert "This is a bug in smartmops. Please report it" in said
    last = said.splitlines()[-1]
    assert all(f"{name} {version}" in last for name, version in versions().items()), last
    assert not is_full(error) and "close other programs" in lower(None, MemoryError())


def test_a_bug_of_an_uninstalled_copy_is_reported_as_well(
    config: TrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(_: str) -> None:
        raise PackageNotFoundError("smartmops")

    monkeypatch.setattr("importlib.metadata.metadata", absent)
    status, said = ended(config, raises(ValueError("a bug of ours")), capsys)
    assert status == 1 and "Please report it (its issue tracker)" in said


@pytest.mark.parametrize("kind", [kind for kind in vars(errors).values() if isinstance(kind, type)],
                         ids=lambda kind: kind.__name__)  # fmt: skip
def test_what_a_user_can_mend_is_a_line(kind: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    assert issubclass(kind, errors.SmartmopsError)
    stopped = kind is errors.QuorumLost
    title, status = ("stopped", 3) if stopped else ("error", 2)
    assert ended(None, raises(kind("mend it")), capsys) == (status, f"{title}: mend it\n")


@pytest.mark.parametrize(("error", "way"), [
    (OSError(errno.ENOSPC, "No space left on device", "/runs/a/metrics.json"), "free some disk space, then"),
    (PermissionError(errno.EACCES, "Permission denied", "/runs/a/metrics.json"), "see to its permissions, or choose"),
    (OSError(errno.EROFS, "Read-only file system", "/runs/a/metrics.json"), "see to its permissions, or choose"),
    (OSError(errno.EMFILE, "Too many open files", "/runs/a/metrics.json"), "allow more open files"),
    (OSError(errno.EIO, "Input/output error", "/runs/a/metrics.json"), "see to its disk"),
    (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "free some disk"),
])  # fmt: skip
def test_a_full_or_closed_disk_is_a_line(
    error: Exception, way: str, config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    status, line = ended(config, raises(error), capsys)
    assert status == 2 and line.count("\n") == 1 and way in line and "--resume" in line
    assert ("free some" in line) == way.startswith("free some")
    assert getattr(error, "filename", None) is None or "/runs/a/metrics.json: " in line
    with pytest.raises(errors.DiskError, match=way), translated(config):
        raise error


def test_every_line_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(None, raises(errors.DataError("a [b] " * 60 + "\n--two 2: choose 1")), capsys)[1].count("\n") == 2
    assert ended(None, raises(QuorumLost("too few")), capsys) == (3, "stopped: too few\n")
    said("error", "[/red] is printed as it is")
    assert capsys.readouterr().err == "error: [/red] is printed as it is\n"


def test_a_parser_that_gives_up_without_a_word_keeps_its_status() -> None:
    with pytest.raises(SystemExit) as stopped:
        parsed(lambda: (_ for _ in ()).throw(SystemExit(0)))
    assert stopped.value.code == 0


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["data", "office"]])
def test_a_command_whose_reader_has_gone_ends_without_a_word(words: list[str]) -> None:
    """`smartmops --help | head` closes the pipe while there is more to say."""
    reader, writer = os.pipe()
    os.close(reader)
    program = "from smartmops.cli import main; main()"
    try:
        ended = subprocess.run(
            [sys.executable, "-c", program, *words], stdout=writer, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(writer)
    assert ended.stderr == b"" and ended.returncode in (1, 141), "141 as SIGPIPE would have it; rich says 1"


def test_a_path_stands_in_a_line_as_it_is_typed(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    line = "runs/[red]/:cat:a, --from runs/x:a: no run"
    assert ended(config, raises(errors.DataError(line)), capsys) == (2, f"error: {line}\n")
