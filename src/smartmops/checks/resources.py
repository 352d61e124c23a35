"""What a machine runs out of: memory, disk space, permission to write, addresses to listen at.

Turns such errors into lines with a way out. Knows errors, and which options cost memory. Imports nothing that takes
time to import.
"""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import DiskError, OutOfMemory, PortTaken, ResourceError, SmartmopsError
from .limits import typed

SIZES = ("batch_size", "max_length", "sequences", "sequence_length", "actors", "experts", "prompt_tokens")
FULL = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory", "alloc_failed")
NO_SPACE = ("no space left on device", "disk quota exceeded", "os error 28", "os error 122", "file write failed")
# Answers of the operating system that more disk, more permissions or a sound disk would change, each with the way out.
WAYS = {
    "free some disk space": ("ENOSPC", "EDQUOT", "EFBIG"),
    "see to its permissions, or choose another place": ("EACCES", "EPERM", "EROFS"),
    "close other programs, or allow more open files (ulimit -n)": ("EMFILE", "ENFILE"),
    "see to its disk, or choose another place": ("EIO", "ESTALE"),
}
REFUSED = {getattr(errno, name): way for way, names in WAYS.items() for name in names if hasattr(errno, name)}


@contextmanager
def translated(config: Any) -> Iterator[None]:
    """Raise a lack of memory or disk space inside the block as an error that a user can mend.

    Raises:
        ResourceError: the machine has too little of something.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, SmartmopsError) or (known := lacking(config, error)) is None:
            raise
        raise known from error


def lacking(config: Any, error: BaseException) -> ResourceError | None:
    """What an error says that the machine lacks, with the way out in the options of `config`; None: nothing."""
    if is_full(error):
        return OutOfMemory(lower(config, error))
    way = REFUSED.get(error.errno or 0) if isinstance(error, OSError) else None
    if way is None and not any(words in str(error).lower() for words in NO_SPACE):
        return None
    reason, file = getattr(error, "strerror", None) or str(error), getattr(error, "filename", None)
    again = ", then go on with --resume" if hasattr(config, "resume") else ""
    return DiskError(f"{f'{file}: ' if file else ''}{reason}: {way or next(iter(WAYS))}{again}")


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


def listening(host: str, port: int) -> socket.socket:
    """A socket bound to an address; port 0 is any that is free.

    Raises:
        PortTaken: it cannot be had.
    """
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise PortTaken(f"--host {host} --port {port} cannot be had ({error.strerror or error}): choose another port, "
                        "or an address of this machine") from error  # fmt: skip
    return found
