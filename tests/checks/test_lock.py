"""One process at a time in a folder; a dead one does not keep it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from smartmops.checks import lock
from smartmops.checks.lock import alone

HOLD = ("import sys; from pathlib import Path; from smartmops.checks.lock import alone\n"
        "with alone(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()")  # fmt: skip


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds `run` until its input ends."""
    environment = os.environ | {"PYTHONPATH": str(Path(lock.__file__).parents[2])}
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], env=environment, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.communicate()


def test_another_process_is_refused_until_the_first_is_done(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(BlockingIOError, match=f"run is in use by process {holder.pid}: wait for it, end it, or"):
        alone(tmp_path / "run").__enter__()
    holder.communicate("")
    assert not (tmp_path / "run").exists(), "left as it was found"
    with alone(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / ".lock").is_file()
    with alone(tmp_path / "run"):
        (tmp_path / "run" / "kept").touch()
    assert os.listdir(tmp_path / "run") == ["kept"]


def test_a_folder_is_held_once_by_whatever_name(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(BlockingIOError, match=f"link is in use by process {holder.pid}"):
        alone(tmp_path / "link").__enter__()
    holder.communicate("")
    with alone(tmp_path / "link"):
        with alone(tmp_path / "run"):
            pass
        assert (tmp_path / "run" / ".lock").is_file(), "the first still holds it"


def test_a_thread_may_hold_it_twice_and_no_other_thread_may(tmp_path: Path) -> None:
    said: list[str] = []

    def other() -> None:
        try:
            alone(tmp_path).__enter__()
        except BlockingIOError as error:
            said.append(str(error))

    with alone(tmp_path):
        with alone(tmp_path):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert (tmp_path / ".lock").exists()
    assert "in use by another thread" in said[0]
    assert list(tmp_path.iterdir()) == []
