"""Sequences larger than memory: written to a file front to back, then memory-mapped and read where they are needed.

Knows Arrow files and dataclasses. Knows no formats of data sets, no tokens and no models.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import pyarrow as pa

from smartmops.checks.errors import ConfigError

T = TypeVar("T")
BATCH = 1024  # items that are written at once


class Stored(Sequence[T], Generic[T]):
    """Items of a mapped file, each made when it is asked for. A slice, or `take`, is a view of the same file.

    What stays in memory is eight bytes for each item of a view, and pages of the file that the system may drop.
    """

    def __init__(self, file: _Mapped, make: Callable[..., T], order: Sequence[int]) -> None:
        self._file, self._make, self._order = file, make, order

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Stored[T]: ...
    def __getitem__(self, index: int | slice) -> T | Stored[T]:
        if isinstance(index, slice):
            return Stored(self._file, self._make, self._order[index])
        return self._make(*self._file.values(self._order[index]))

    def take(self, indices: Iterable[int]) -> Stored[T]:
        """A view of these items, in this order."""
        return Stored(self._file, self._make, array("q", (self._order[i] for i in indices)))


def take(items: Sequence[T], indices: Iterable[int]) -> Sequence[T]:
    """These items, in this order: a view of stored ones, a list of others."""
    return items.take(indices) if isinstance(items, Stored) else [items[i] for i in indices]


def store(
    items: Iterable[T], schema: pa.Schema, parts: Callable[[T], Sequence[Any]], make: Callable[..., T], folder: Path
) -> Stored[T]:
    """Write items to a new file in `folder`, and map it. Its room is free again as soon as nothing here reads it.

    Args:
        items: Read once, a thousand at a time.
        schema: Names and types of an item's parts.
        parts: Takes an item apart, in the schema's order.
        make: Makes an item of its parts, given in the same order.
        folder: Made if it is not there.

    Raises:
        ConfigError: the folder cannot be written to, or its disk is full.
    """
    name = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(".arrow", "rows-", folder)
        os.close(handle)
        count = _write(map(parts, items), schema, name)
        return Stored(_Mapped(name), make, range(count))
    except OSError as error:
        raise ConfigError(f"rows={str(folder)!r} cannot be written to ({error.strerror or error}): choose another "
                          "folder, free some of its disk, or choose rows='memory'") from error  # fmt: skip
    finally:
        if name:
            with suppress(PermissionError):  # Windows keeps what is mapped
                os.unlink(name)


def _write(rows: Iterator[Sequence[Any]], schema: pa.Schema, name: str) -> int:
    """How many there were."""
    count = 0
    with pa.OSFile(name, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        while some := list(islice(rows, BATCH)):
            columns = [
                pa.array(values, kind) for values, kind in zip(zip(*some, strict=True), schema.types, strict=True)
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            count += len(some)
    return count


class _Mapped:
    """A file of record batches, all of `BATCH` items but the last."""

    def __init__(self, name: str) -> None:
        self._reader = pa.ipc.open_file(pa.memory_map(name))
        self._number, self._columns = -1, list[Any]()

    def values(self, item: int) -> list[Any]:
        number, at = divmod(item, BATCH)
        if number != self._number:
            self._number, self._columns = number, self._reader.get_batch(number).columns
        return [column[at].as_py() for column in self._columns]
