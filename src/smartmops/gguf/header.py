"""The header of a GGUF, walked once: whether what it counts can lie in the file at all. Makes nothing of it.

gguf's own reader believes every count: a damaged one of 2^60 entries would keep it busy for ever, its memory
growing.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import BinaryIO

from smartmops.checks.errors import BaseModelError

SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of each type of value
TEXT, LIST = 8, 9
DEEP = 4  # lists in lists
VERSIONS = (2, 3)


class _Header:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.order = "<"

    def skip(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise BaseModelError(f"it counts {count} bytes at byte {self.file.tell()} of {self.size}")
        self.file.seek(count, 1)

    def number(self, kind: str) -> int:
        width = struct.calcsize(kind)
        found = self.file.read(width)
        if len(found) < width:
            raise BaseModelError(f"it ends at byte {self.size}, inside its header")
        return int(struct.unpack(self.order + kind, found)[0])

    def text(self) -> str:
        length = self.number("Q")
        start = self.file.tell()
        self.skip(length)
        self.file.seek(start)
        return self.file.read(length).decode()

    def value(self, kind: int, depth: int = 0) -> None:
        if kind in SCALARS:
            self.skip(SCALARS[kind])
        elif kind == TEXT:
            self.skip(self.number("Q"))
        elif kind == LIST and depth < DEEP:
            inner, count = self.number("I"), self.number("Q")
            if count > self.size - self.file.tell():  # each is a byte at least
                raise BaseModelError(f"it counts {count} values at byte {self.file.tell()} of {self.size}")
            if inner in SCALARS:
                self.skip(SCALARS[inner] * count)
                return
            for _ in range(count):
                self.value(inner, depth + 1)
        else:
            raise BaseModelError(f"it has a value of type {kind} at byte {self.file.tell()}")

    def tensor(self) -> None:
        name, dimensions = self.text(), self.number("I")
        if not 1 <= dimensions <= 4:
            raise BaseModelError(f"tensor {name!r:.80} has {dimensions} dimensions")
        sizes = [self.number("Q") for _ in range(dimensions)]
        if 0 in sizes or math.prod(sizes) > 32 * self.size:  # a number takes a quarter of a bit at least
            raise BaseModelError(f"tensor {name!r:.80} of sizes {sizes} is larger than the file")
        self.number("I")
        if self.number("Q") > self.size:
            raise BaseModelError(f"tensor {name!r:.80} lies behind the end of the file")


def walk(path: Path) -> None:
    """Go through the header of a GGUF.

    Raises:
        BaseModelError: it counts more than the file holds, or is no GGUF.
    """
    with path.open("rb") as file:
        header = _Header(file, path.stat().st_size)
        if file.read(4) != b"GGUF":
            raise BaseModelError("it does not begin with GGUF")
        version = header.number("I")
        if version & 65535 == 0:  # the other order of bytes
            header.order, version = ">", int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in VERSIONS:
            raise BaseModelError(
                f"it is of version {version}, and versions {VERSIONS[0]} and {VERSIONS[1]} can be read"
            )
        tensors, values = header.number("Q"), header.number("Q")
        if max(tensors, values) > header.size:
            raise BaseModelError(f"it counts {tensors} tensors and {values} values in {header.size} bytes")
        names = set()
        for _ in range(values):
            names.add(header.text())
            header.value(header.number("I"))
        if len(names) < values:
            raise BaseModelError("it names one value twice")
        for _ in range(tensors):
            header.tensor()
