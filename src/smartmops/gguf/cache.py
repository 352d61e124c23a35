"""The folder in which what was fetched or converted is kept: made once, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_dir

from smartmops.checks.errors import DiskError


def cache() -> Path:
    """The folder of fetched and converted models: `SMARTMOPS_CACHE`, or the user's cache folder."""
    given = os.environ.get("SMARTMOPS_CACHE")
    return Path(given).expanduser() if given else Path(user_cache_dir("smartmops"))


def once(folder: Path, make: Callable[[Path], None], room: int = 0) -> Path:
    """`folder`, filled by `make(unfinished folder)` unless it is there; of several processes, one makes it.

    `room` is what has to be free on the disk, in bytes.

    Raises:
        DiskError: the folder cannot be written, or the disk is too full.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():
                _fill(folder, make, room)
    except PermissionError as error:
        raise _no_room(folder, str(error)) from error
    return folder


def _fill(folder: Path, make: Callable[[Path], None], room: int) -> None:
    if (free := shutil.disk_usage(folder.parent).free) < room:
        raise _no_room(folder, f"{free / 1e9:.2f} GB are free, {room / 1e9:.2f} GB are needed")
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as name:
        unfinished = Path(name) / folder.name
        unfinished.mkdir()
        make(unfinished)
        os.replace(unfinished, folder)


def _no_room(folder: Path, why: str) -> DiskError:
    return DiskError(f"{folder} cannot be written ({why}): make room there, or set SMARTMOPS_CACHE to another folder")
