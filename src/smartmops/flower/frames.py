"""Words and blobs over a local socket. Standard library only: this file also travels inside Flower's app bundle.

A frame is eight bytes of length, that many bytes of JSON, and then the blobs whose lengths the JSON lists.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from typing import Any

from smartmops.checks.errors import FederationUnreachable

MAX_WORDS = 1 << 24  # bytes of JSON; more is not one of our frames


def send(to: socket.socket, words: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
    """One frame; blocks until it is handed over."""
    header = json.dumps({"words": words, "sizes": [len(blob) for blob in blobs]}).encode()
    to.sendall(len(header).to_bytes(8, "big") + header)
    for blob in filter(None, blobs):  # whoever has read a whole frame may hang up, and then nothing can be sent of it
        to.sendall(blob)


def receive(source: socket.socket) -> tuple[dict[str, Any], list[bytes]]:
    """One frame, whole.

    Raises:
        FederationUnreachable: the other side is gone, or speaks something else.
    """
    size = int.from_bytes(_exactly(source, 8), "big")
    if size > MAX_WORDS:
        raise FederationUnreachable(f"a frame of {size} bytes of words: the limit is {MAX_WORDS}")
    header = json.loads(_exactly(source, size))
    return header["words"], [_exactly(source, each) for each in header["sizes"]]


def connect(path: str) -> socket.socket:
    """To the process that listens at `path`.

    Raises:
        FederationUnreachable: nobody listens there.
    """
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        found.connect(path)
    except OSError:
        found.close()
        raise
    return found


def _exactly(source: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = source.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise FederationUnreachable("the other side closed the connection")
        parts += part
    return bytes(parts)
