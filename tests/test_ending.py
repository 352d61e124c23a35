"""A kill, Ctrl-C and a lack of memory end a command with one line, a status, and a way on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from smartmops.checks.quorum import QuorumLost
from smartmops.ending import ending, is_full, lower, parsed, said
from smartmops.options.compression import CompressConfig
from smartmops.options.training import TrainConfig


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
    assert status == 1 and line.count("\n") == 1
    assert line.startswith("error: out of memory") and "lower --batch-size (now 64) or --max-length (now 512)" in line
    assert "--dtype bfloat16" in line and "--activations off" in line


def test_other_faults_of_ours_keep_their_traceback(config: TrainConfig) -> None:
    with pytest.raises(RuntimeError, match="shapes"), ending(config):
        raise RuntimeError("shapes do not fit")
    assert not is_full(RuntimeError("shapes do not fit"))
    assert "close other programs" in lower(None, MemoryError())


def test_every_line_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(None, raises(ValueError("a [b] " * 60 + "\n--two 2: choose 1")), capsys)[1].count("\n") == 2
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


def test_another_broken_pipe_is_an_error_like_others(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(config, raises(BrokenPipeError("a client hung up")), capsys) == (2, "error: a client hung up\n")
