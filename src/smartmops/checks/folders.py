"""Files and folders that options name: what can be made, what is there, and what lies near a mistyped name.

Knows paths. Writes nothing that stays, but for the folder and the file that others fill.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

from .errors import ConfigError, FileTaken, NotAFolder, RunError, RunExists, RunNotFound, WrongType

log = logging.getLogger(__name__)
MARK = ".lock"  # of a folder that a process writes; says nothing of what the folder holds
UNFINISHED = ".tmp"  # ending of everything half-written; a resumed run sweeps them away
NEAR = 3  # folders that are named where the one asked for is not there


def as_path(name: str, value: Any, what: str) -> Path:
    """An argument that is a path, or text that is one.

    Raises:
        WrongType, ConfigError: it is something else, or blank.
    """
    if not isinstance(value, str | Path):
        raise WrongType(f"{name}={value!r}: give {what}")
    if not str(value).strip():
        raise ConfigError(f"{name}={value!r} is blank: give {what}")
    return Path(value)


@dataclass(frozen=True)
class Folder:
    """A folder that is there and can be written, or that can be made."""

    def wrong(self, value: Any) -> str | None:
        """As `limits.Limit`."""
        return unmade(Path(value))


@dataclass(frozen=True)
class Writable:
    """A file that can be written."""

    def wrong(self, value: Any) -> str | None:
        """As `limits.Limit`."""
        path = Path(value)
        if path.is_dir():
            return " is a folder: name a file in it"
        if path.parent.is_file():
            return f" cannot be made, {path.parent} is a file: choose another folder"
        if path.exists() and not os.access(path, os.W_OK):
            return " cannot be written: name another file"
        if (said := unmade(path.parent)) is not None or path.exists() or not path.parent.is_dir():
            return said
        try:
            with suppress(FileExistsError):  # another process makes it at this moment
                path.touch(exist_ok=False)
                path.unlink()
        except (OSError, ValueError) as error:
            return f" cannot be made ({getattr(error, 'strerror', None) or error}): choose another name"
        return None


@dataclass(frozen=True)
class WordOrFolder:
    """One of some words, or a folder; one that is new must look like one, so that no typing error becomes one."""

    words: tuple[str, ...]

    def wrong(self, value: Any) -> str | None:
        """As `limits.Limit`."""
        if value in self.words:
            return None
        separators = [each for each in (os.sep, os.altsep) if each]
        if not value or not (Path(value).exists() or any(each in value for each in separators)):
            return f": choose {', '.join(self.words)}, or a folder such as .{os.sep}{value or 'cache'}"
        return unmade(Path(value))


@dataclass(frozen=True)
class WordOrFile:
    """One of some words, or a file that is there."""

    words: tuple[str, ...]
    what: str

    def wrong(self, value: Any) -> str | None:
        """As `limits.Limit`."""
        if value in self.words or Path(value).is_file():
            return None
        return f": choose {', '.join(self.words)}, or {self.what}"


@dataclass(frozen=True)
class Existing:
    """A file, or with `folder` a folder, that is there."""

    what: str
    folder: bool = False

    def wrong(self, value: Any) -> str | None:
        """As `limits.Limit`."""
        path = expanded(value)
        if not path.exists():
            return f" does not exist: give {self.what}{near(path)}"
        if path.is_dir() != self.folder:
            return f" is a {'file' if self.folder else 'folder'}: give {self.what}"
        return None


def expanded(name: str | Path) -> Path:
    """A path, `~` and `~user` at its beginning replaced by the folder of that user, if there is one."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # a file may be called so
        return Path(name)


OutFolder = Annotated[Path, Folder()]
OutFile = Annotated[Path, Writable()]


def unmade(path: Path) -> str | None:
    """Why a folder cannot be made or written, as it stands behind its name; None: it can be."""
    try:
        if path.exists():
            if not path.is_dir():
                return " is a file: choose a folder"
            return None if os.access(path, os.W_OK | os.X_OK) else " cannot be written: choose another folder"
        above = next(each for each in path.absolute().parents if each.exists())
        if not above.is_dir():
            return f" cannot be made, {above} is a file: choose another folder"
        first = path.absolute()
        while first.parent != above:
            first = first.parent
        with suppress(FileExistsError):  # another process asks, or makes it, at this moment
            first.mkdir()  # the only question that every file system answers truly
            with suppress(OSError):
                first.rmdir()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        return f" cannot be made ({reason}): choose another folder"
    return None


def held_by(path: Path) -> list[str]:
    """Names of what a folder holds, but for what is half written; none of one that is not there."""
    found = path.iterdir() if path.is_dir() else iter(())
    return sorted(item.name for item in found if item.name != MARK and not half_written(item))


def filled(path: Path, name: str) -> RunExists | None:
    """Why nothing new can be put into a folder that an option names; None: it is empty, or not there."""
    held = held_by(path)
    return RunExists(f"{name} {path} holds {held[0]}: choose another folder") if held else None


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A folder to fill, whose files are those of a new or empty one at the end; where that fails, nothing is left.

    Who calls it holds `path`, so what others left in it half filled is of processes that were killed, and goes.
    """
    path = path.resolve()
    there = path.exists()  # and stays: it may be where the process or its shell is, or a mount
    fresh = fresh_beside(path, path if there else path.parent)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        if not there:
            os.replace(fresh, path)
            return
        for item in list(fresh.iterdir()):
            os.replace(item, path / item.name)
        fresh.rmdir()
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def fresh_beside(path: Path, place: Path) -> Path:
    """Where in `place` to fill what will be called `path`; what killed processes left there of it goes."""
    left = re.compile(rf"\.{re.escape(path.name)}\.\d+{re.escape(UNFINISHED)}")
    for item in list(place.iterdir()) if place.is_dir() else []:
        if left.fullmatch(item.name):
            shutil.rmtree(item, ignore_errors=True)
    return place / f".{path.name}.{os.getpid()}{UNFINISHED}"


def beside(out: Path) -> Path:
    """Where what is half done is kept."""
    return out.with_name(f"{out.name}.partial")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what is to stand at `path` whole or not at all: a file beside it, synced, then renamed over it."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        yield fresh
        with open(fresh, "rb") as written:
            os.fsync(written.fileno())
        os.replace(fresh, path)
    except BaseException as error:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:
            error.filename = str(path)  # not the one beside it, which nobody asked for
        raise


@contextmanager
def growing(path: Path) -> Iterator[TextIO]:
    """A text file that takes the place of another at the end; what was written until a failure stays beside it.

    Half a surrogate pair is written as JSON spells it. Who may read the file that was there may read the new one.

    Raises:
        FileTaken: another command writes the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # a device or a pipe, whose place nothing can take
        with path.open("w", encoding="utf-8", errors="backslashreplace", buffering=1) as file:
            yield file
        return
    path = path.resolve()
    partial, mode = beside(path), stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    try:
        opened = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else 0o600)
    except FileExistsError as error:
        raise FileTaken(f"{path} is being written by another command, to {partial}: name another file") from error
    try:
        with open(opened, "w", encoding="utf-8", errors="backslashreplace", buffering=1) as file:
            if mode is not None:
                partial.chmod(mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        if partial.stat().st_size:
            log.warning("%s keeps what was written until then: before the same command again, move it away or delete "
                        "it; %s %s", partial, path, "was not made" if mode is None else "is as it was")  # fmt: skip
        else:
            partial.unlink()
        raise


def half_written(item: Path) -> bool:
    """Whether a kill left it."""
    return item.name.startswith(".") and item.name.endswith(UNFINISHED)


def refused(path: Path, resume: bool, *, resumes: bool = True) -> RunError | None:
    """Why no run can start in a folder, or with `resume` go on there; None: it can. `resumes`: whether any can."""
    if path.exists() and not path.is_dir():
        return NotAFolder(f"--out {path} is a file: choose a folder")
    held = held_by(path)
    if resume and not path.exists():
        return missing(path, near(path, is_run))
    if held and not resume:
        return RunExists(f"--out {path} exists and holds {_described(held, resumes)}")
    if held and "config.json" not in held:
        return RunExists(f"--resume: {path} is no run, it holds {held[0]} but no config.json: choose another folder")
    return None


def missing(path: Path, others: str) -> RunNotFound:
    """There is nothing to resume; `others` are folders with something, as `near` names them."""
    return RunNotFound(f"--resume: --out {path} does not exist, so there is nothing to go on with: mend the "
                       f"name{others}, or leave --resume away to start")  # fmt: skip


def _described(held: list[str], resumes: bool) -> str:
    """What a folder holds, and the way out."""
    if "config.json" not in held:
        return f"files of something else ({held[0]}{', ...' if len(held) > 1 else ''}): choose another folder"
    kind = "a finished run" if "metrics.json" in held else "an unfinished run"
    return f"{kind}: choose another folder" + (", or resume with --resume" if resumes else "")


def is_run(folder: Path) -> bool:
    """Whether a run wrote its config.json, and not a model; so also where it cannot be read: who opens it says why."""
    file = folder / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return file.is_file()
    return not isinstance(found, dict) or "arguments" in found


def before(path: Path) -> Path:
    """Where a folder stands while another is put in its place."""
    return path.with_name(f".{path.name}.before{UNFINISHED}")


def near(path: Path, fits: Callable[[Path], bool] | None = None) -> str:
    """The names beside `path` that are most like it, as the end of a sentence; empty where there are none.

    With `fits`, only those that it lets through.
    """
    try:
        beside = [item.name for item in path.absolute().parent.iterdir() if not item.name.startswith(".")
                  and (fits is None or fits(item))]  # fmt: skip
    except OSError:
        return ""
    most = 0.0 if fits else 0.6
    found = difflib.get_close_matches(path.name, beside, NEAR, most)
    return f" (there {'are' if len(found) > 1 else 'is'} {', '.join(str(path.parent / name) for name in found)})" if (
        found) else ""  # fmt: skip
