"""A round's answers, out of memory: a server's own must not grow with the clients that answer. Knows bytes alone."""

from __future__ import annotations

import tempfile

AT_HAND = 2**26  # bytes that stay in memory before anything is written


class Spool:
    """Blobs in the order in which they came; beyond `AT_HAND` bytes in a file without a name, which goes when it ends.

    The file is where temporary files are (`TMPDIR`).
    """

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(AT_HAND)  # noqa: SIM115  for as long as the answers are looked at
        self._end = 0

    def put(self, blob: bytes) -> tuple[int, int]:
        """Where the blob lies from now on."""
        self._file.seek(self._end)
        self._file.write(blob)
        at = self._end, len(blob)
        self._end += len(blob)
        return at

    def get(self, at: tuple[int, int]) -> bytes:
        """The blob that lies there."""
        self._file.seek(at[0])
        return self._file.read(at[1])
