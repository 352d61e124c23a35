"""Programs that end when this process does, whatever ends it: `kill -9` too, which leaves a process no last word.

The program runs in a process group of its own, and the group is led by a watcher that reads a pipe which this process
holds. The kernel closes the pipe when this process is gone, and the watcher ends the group, itself last. Standard
library only: the watcher is this file, started as a program.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

PATIENCE = 10.0  # seconds that a program may take to end once it is told to
READY = b"!"


@contextmanager
def guarded(command: Sequence[str], **given: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The program, started; it ends when this process is told to, and it and its own have ended when the block is left.

    `given` goes to `Popen`.
    """
    with _told(), _watcher() as watcher:
        child: subprocess.Popen[bytes] = subprocess.Popen(command, process_group=watcher.pid, **given)
        try:
            yield child
        finally:
            child.terminate()
            try:
                child.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


@contextmanager
def _told() -> Iterator[None]:
    """A polite end of this process (SIGTERM) leaves blocks as an exception does."""
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)) if in_main else None
    try:
        yield
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _watcher() -> Iterator[subprocess.Popen[bytes]]:
    """Leads a new process group, of which nothing is left when the block is."""
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
    )
    assert watcher.stdin is not None and watcher.stdout is not None
    try:
        if watcher.stdout.read(1) != READY:
            raise ChildProcessError("the watcher of Flower's programs did not start")
        yield watcher
    finally:
        # Not reaped before it has gone: its number is the group's, and must not become another's.
        with suppress(ProcessLookupError):
            os.killpg(watcher.pid, signal.SIGKILL)
        watcher.wait()
        watcher.stdin.close()
        watcher.stdout.close()


def _watch() -> None:
    """Until the pipe closes; then the group is asked to end, given `PATIENCE` seconds, and killed."""
    for polite in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(polite, signal.SIG_IGN)
    os.write(1, READY)
    os.close(1)
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGTERM)
    time.sleep(PATIENCE)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    _watch()
