"""Guarded programs end with the process that started them, whatever ends it, and so do the programs they started.

Nothing waits for a time: each program of the tests holds the end of a pipe, and whoever reads it learns that all are gone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from smartmops.deployment import guard

# A program that starts another; both say so, hold the pipe, and would live for an hour. "deaf": neither minds SIGTERM.
FAMILY = "sh -c '{deaf}echo child; exec sleep 3600' & {deaf}echo parent; wait; sleep 3600"
# A program started in the background of a shell inherits SIGINT as ignored, so Python would set no handler.
OWNER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {place!r})
import guard
guard.PATIENCE = 0.2
with guard.guarded(["sh", "-c", {script!r}], stdout={fd}):
    sys.stdin.read()
"""


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """Where the programs of a test say that they have started, and say by their end that they have ended."""
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    try:
        yield reading, writing
    finally:
        os.close(reading)


def family(deaf: bool = False) -> str:
    return FAMILY.format(deaf='trap "" TERM; ' if deaf else "")


def both_started(reading: int) -> None:
    found = b""
    while not (b"parent" in found and b"child" in found):
        said = os.read(reading, 100)
        assert said, f"both ended before they had started: {found!r}"
        found += said


def all_ended(reading: int) -> None:
    while os.read(reading, 100):
        pass


@pytest.mark.parametrize("signalled", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("deaf", [False, True])
def test_whatever_ends_the_owner_ends_its_programs_and_theirs(signalled: signal.Signals, deaf: bool) -> None:
    with pipe() as (reading, writing):
        place = str(Path(guard.__file__).parent)
        script = OWNER.format(place=place, script=family(deaf), fd=writing)
        owner = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=(writing,)
        )
        os.close(writing)
        both_started(reading)
        owner.send_signal(signalled)
        assert owner.wait() != 0
        assert owner.stdin is not None
        owner.stdin.close()
        all_ended(reading)


@pytest.mark.parametrize("killed", [False, True])
def test_when_the_block_is_left_nothing_of_the_program_is(monkeypatch: pytest.MonkeyPatch, killed: bool) -> None:
    monkeypatch.setattr(guard, "PATIENCE", 0.1)
    with pipe() as (reading, writing):
        with guard.guarded(["sh", "-c", family(deaf=True)], stdout=writing) as program:
            os.close(writing)
            both_started(reading)
            if killed:
                program.kill()
                program.wait()
        assert program.returncode == -signal.SIGKILL
        all_ended(reading)


def test_a_program_that_cannot_be_started_leaves_no_watcher() -> None:
    before, children = signal.getsignal(signal.SIGTERM), set(psutil.Process().children())  # other tests may leave some
    with pytest.raises(FileNotFoundError), guard.guarded(["/no/such/program"]):
        pytest.fail("started")
    assert signal.getsignal(signal.SIGTERM) is before
    assert set(psutil.Process().children()) <= children
