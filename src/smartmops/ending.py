"""How a command ends: every error of the user's, a kill and a lack of memory as lines on stderr, and an exit status.

Knows errors, signals and configs. Imports nothing that takes time to import.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from rich.console import Console
from rich.markup import escape

from smartmops.checks.limits import typed
from smartmops.checks.quorum import QuorumLost
from smartmops.options.compression import CompressConfig, beside

WRONG, NO_MEMORY, QUORUM, CTRL_C, UNREAD, KILLED = 2, 1, 3, 130, 141, 143  # exit statuses
SIZES = ("batch_size", "max_length", "sequences", "sequence_length", "actors", "experts", "prompt_tokens")
FULL = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory", "alloc_failed")
FRAME = re.compile(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]+|^\s*[|+]-*|\|\s*$", re.MULTILINE)  # what tyro draws around its words

T = TypeVar("T")


class Terminated(KeyboardInterrupt):
    """Told to end by SIGTERM; like Ctrl-C, nothing but the end of the command catches it."""


def said(title: str, message: str) -> None:
    """Lines on stderr, never wrapped: each is one."""
    console = Console(stderr=True, soft_wrap=True)
    for line in message.splitlines() or [""]:
        console.print(f"[red]{title}:[/red] {escape(line)}", highlight=False)


def parsed(parse: Callable[[], T]) -> T:
    """What `parse` makes of the command line; what it has against it, as one line.

    Raises:
        SystemExit: the command line is wrong, or asks for help only.
    """
    written = io.StringIO()
    try:
        with contextlib.redirect_stderr(written):
            return parse()
    except SystemExit as stop:
        if stop.code and (words := _plain(written.getvalue())):
            said("error", words)
        raise


def _plain(drawn: str) -> str:
    """The words in a frame up to its first rule, and names that are offered instead; without the frame."""
    parts = re.split(r"[│|]?\s*[─-]{8,}\s*[│|╮╯]?\n", drawn.partition("\n")[2])
    words = [" ".join(FRAME.sub(" ", part).split()) for part in parts]
    offered = re.findall(r"^[│|]\s+(--[\w-]+)", next((part for part in parts if "Perhaps you meant" in part), ""), re.M)
    listed = next((each for each in words if each.startswith("Available subcommands")), "")
    others = [f"perhaps {' or '.join(dict.fromkeys(offered))} is meant"] if offered else [listed] if listed else []
    first = next(filter(None, words), "")
    return ": ".join(filter(None, [first.rstrip("."), *others]))


@contextmanager
def ending(config: Any = None) -> Iterator[None]:
    """Whatever ends the block early ends the process with lines and a status.

    Raises:
        SystemExit: it was ended early.
    """
    with _terminable():
        try:
            yield
        except (OSError, ValueError, ImportError) as error:
            if isinstance(error, BrokenPipeError) and _reader_gone():
                raise
            said("error", str(error) or type(error).__name__)
            _leave(WRONG, error)
        except QuorumLost as error:
            said("stopped", str(error))
            _leave(QUORUM, error)
        except KeyboardInterrupt as error:
            killed = isinstance(error, Terminated)
            said("stopped", f"by {'SIGTERM' if killed else 'Ctrl-C'}{way_on(config)}")
            _leave(KILLED if killed else CTRL_C, error)
        except (MemoryError, RuntimeError) as error:
            if not is_full(error):
                raise
            said("error", lower(config, error))
            _leave(NO_MEMORY, error)


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


def is_full(error: BaseException) -> bool:
    """Whether an error says that memory, of the machine or of a device, was not enough."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in FULL)


def lower(config: Any, error: BaseException) -> str:
    """What to lower where the memory was not enough."""
    given = [(name, getattr(config, name, None)) for name in SIZES]
    ways = [f"{typed(name)} (now {value})" for name, value in given if isinstance(value, int) and value > 1]
    less = f"lower {' or '.join(ways)}" if ways else "close other programs"
    for name, choice in (("dtype", "bfloat16"), ("activations", "off")):
        if getattr(config, name, choice) != choice:
            less += f", or choose {typed(name)} {choice}"
    asked = re.search(r"tried to allocate ([\d.]+ ?\w+)", str(error))
    return f"out of memory{f' ({asked[1]} asked for at once)' if asked else ''}: {less}"


def quiet() -> None:
    """No bars of transformers' loading and saving, nor its warnings of its own future: ours say what takes time."""
    import warnings

    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
