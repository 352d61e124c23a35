"""Data that are read before a run begins, to see whether its options fit them, and kept until the run reads them.

So small files are read once, and what is said of them is said once, when the run reads them. Knows no formats.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from smartmops.rows.example import Example

SPOKEN = "smartmops.data"  # the logger whose words are kept with the examples
MOST = 2  # readings that are kept at once: of a run that never came, the examples would stay for ever
Stamp = tuple[tuple[int, int, int], ...]


@dataclass
class _Kept:
    """One reading."""

    stamp: Stamp
    examples: list[Example]
    said: list[logging.LogRecord]


_kept: dict[Hashable, _Kept] = {}
_reading_ahead = False


@contextmanager
def ahead() -> Iterator[None]:
    """What is read inside is said and handed out to whoever reads the same next, if the files are still the same."""
    global _reading_ahead
    before, _reading_ahead = _reading_ahead, True
    try:
        yield
    finally:
        _reading_ahead = before


def once(key: Hashable, names: Sequence[str], read: Callable[[], list[Example]]) -> list[Example]:
    """What `read` returns, or what it returned a moment ago; `key` is all that decides about it beside the files."""
    if not _reading_ahead:
        found = taken(key, names)
        return read() if found is None else found
    stamp, kept = _stamp(names), _kept.get(key)
    if kept is not None and kept.stamp == stamp:
        return list(kept.examples)
    with _overheard() as said:
        examples = read()
    if stamp is not None:
        _kept.pop(key, None)
        _kept[key] = _Kept(stamp, examples, said)
        while len(_kept) > MOST:
            del _kept[next(iter(_kept))]
    return list(examples)


def taken(key: Hashable, names: Sequence[str]) -> list[Example] | None:
    """What is kept under `key`, which is then kept no longer; None where there is nothing, or a file has changed."""
    found = _kept.pop(key, None)
    if found is None or found.stamp != _stamp(names):
        return None
    for record in found.said:
        logging.getLogger(record.name).handle(record)
    return found.examples


def _stamp(names: Sequence[str]) -> Stamp | None:
    """What changes when a file does; None where a name is no file and so cannot tell (`office` never changes)."""
    found = []
    for name in names:
        if name == "office":
            continue
        path = Path(name)
        if not path.is_file():
            return None
        status = path.stat()
        found.append((status.st_mtime_ns, status.st_size, status.st_ino))
    return tuple(found)


class _Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record)


@contextmanager
def _overheard() -> Iterator[list[logging.LogRecord]]:
    """What is logged of data inside, which nobody else hears."""
    logger, listener = logging.getLogger(SPOKEN), _Listener()
    before, logger.propagate = logger.propagate, False
    handlers, logger.handlers = logger.handlers, [listener]
    try:
        yield listener.heard
    finally:
        logger.propagate, logger.handlers = before, handlers
