"""One process at a time in a folder. A holder that is killed lets go: the system takes its lock from it.

Knows folders and processes, and nothing of what is written.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from smartmops.checks.errors import RunBusy

from .folders import MARK

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TRIES = 10  # of opening a mark that another process is just taking away


@dataclass
class _Held:
    file: TextIO
    thread: int
    times: int = 1


_held: dict[Path, _Held] = {}
_guard = threading.Lock()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if need be; left as empty as it was found, it is taken away again.

    A thread may hold a folder more than once. The lock is of the process, not of the open file, so that children which
    outlive it do not keep it.

    Raises:
        RunBusy: another process, or another thread, holds it.
        RunBusy: the folder cannot be made or written.
    """
    if fcntl is None:
        yield
        return
    mark = folder.resolve() / MARK  # by whatever name it is asked for, it is held once
    made = [each for each in (mark.parent, *mark.parent.parents) if not each.exists()]
    with _guard:
        _take(mark, folder)
    try:
        yield
    finally:
        with _guard:
            _give(mark, made)


def _take(mark: Path, folder: Path) -> None:
    if (held := _held.get(mark)) is not None:
        if held.thread != threading.get_ident():
            raise RunBusy(f"--out {folder} is in use by another thread: choose another folder")
        held.times += 1
        return
    for _ in range(TRIES):
        with suppress(FileNotFoundError):  # another process gave it back, and took its folder away
            mark.parent.mkdir(parents=True, exist_ok=True)
            file = open(mark, "a+")  # noqa: SIM115  for as long as it is held
            if not _locked(file, folder):
                continue
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            _held[mark] = _Held(file, threading.get_ident())
            return
    raise RunBusy(f"--out {folder} is begun by others again and again: choose another folder")


def _locked(file: TextIO, folder: Path) -> bool:
    """Whether this process now holds the file that stands in the folder; False: it was taken away meanwhile."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            return True  # a file system without locks
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise RunBusy(f"--out {folder} is in use by process {holder or 'unknown'}: wait for it, end it, or "
                      "choose another folder") from error  # fmt: skip
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
            return True
    file.close()
    return False


def _give(mark: Path, made: list[Path]) -> None:
    held = _held[mark]
    held.times -= 1
    if held.times:
        return
    del _held[mark]
    mark.unlink(missing_ok=True)  # while it is still held, so that nobody holds what is not there
    held.file.close()
    with suppress(OSError):  # where something was written, it stays
        for folder in made:
            folder.rmdir()
