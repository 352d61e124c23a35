"""How a command ends: what a user can mend as lines on stderr, a bug with its traceback, and an exit status.

Knows errors, signals and configs. Imports nothing that takes time to import.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console
from rich.text import Text

from smartmops.checks.errors import QuorumLost, SmartmopsError
from smartmops.checks.folders import beside
from smartmops.checks.resources import lacking
from smartmops.options.compression import CompressConfig

FAULT, WRONG, QUORUM, CTRL_C, UNREAD, KILLED = 1, 2, 3, 130, 141, 143  # exit statuses


class Terminated(KeyboardInterrupt):
    """Told to end by SIGTERM; like Ctrl-C, nothing but the end of the command catches it."""


def said(title: str, message: str) -> None:
    """Lines on stderr, never wrapped: each is one."""
    console = Console(stderr=True, soft_wrap=True, emoji=False, markup=False)
    for line in message.splitlines() or [""]:
        console.print(Text.assemble((f"{title}:", "red"), " ", line), highlight=False)


@contextmanager
def ending(config: Any = None) -> Iterator[None]:
    """Whatever ends the block early ends the process with lines and a status.

    Raises:
        SystemExit: it was ended early.
    """
    with _terminable():
        try:
            yield
        except QuorumLost as error:
            said("stopped", str(error))
            _leave(QUORUM, error)
        except KeyboardInterrupt as error:
            killed = isinstance(error, Terminated)
            said("stopped", f"by {'SIGTERM' if killed else 'Ctrl-C'}{way_on(config)}")
            _leave(KILLED if killed else CTRL_C, error)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _reader_gone():
                raise
            known = error if isinstance(error, SmartmopsError) else lacking(config, error)
            if known is None:
                _ask_for_report(error)
                _leave(FAULT, error)
            said("error", str(known) or type(known).__name__)
            _leave(WRONG, error)


def _ask_for_report(error: Exception) -> None:
    """The traceback, and what to send with it."""
    from importlib.metadata import PackageNotFoundError, metadata
    from platform import platform

    from smartmops.settings.writing import versions

    traceback.print_exception(error)
    where = "its issue tracker"
    with suppress(PackageNotFoundError):  # run from its source
        where = (metadata("smartmops").get_all("Project-URL") or [where])[-1].rpartition(", ")[2]
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(f"\nThis is a bug in smartmops. Please report it ({where}) with the command, the lines above, and this "
          f"one:\n{found}; {platform()}", file=sys.stderr)  # fmt: skip


@contextmanager
def unread() -> Iterator[None]:
    """Where whoever read the output has gone (`| head`), the process ends without a word, as SIGPIPE would end it.

    Raises:
        SystemExit: that is so.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        raise SystemExit(UNREAD) from None


def _reader_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more: other pipes break for reasons of their own."""
    try:
        asked = select.poll()
        asked.register(sys.stdout.fileno(), 0)
    except (AttributeError, OSError, ValueError):  # no such call on this system, or no file behind it
        return False
    return any(event & select.POLLERR for _, event in asked.poll(0))


def _leave(status: int, error: BaseException) -> NoReturn:
    raise SystemExit(status) from error


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds the block once, so that files are closed and children ended; a second one ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def way_on(config: Any) -> str:
    """What can be done about a command that was stopped, as the end of a sentence."""
    out: Path | None = getattr(config, "out", None)
    if out is None or not hasattr(config, "resume"):
        return ""
    begun = beside(out) if isinstance(config, CompressConfig) else out / "config.json"
    if not begun.exists():
        return ": nothing was begun, so nothing is kept"
    return f": the same command with --resume goes on, to the same result ({out})"


def quiet() -> None:
    """No bars of transformers' loading and saving, nor its warnings of its own future: ours say what takes time."""
    import warnings

    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
