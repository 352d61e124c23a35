"""Frames: out as they went in, and what a peer's haste or noise does to them."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from smartmops.flower.frames import MAX_WORDS, receive, send


@pytest.mark.parametrize("blobs", [[], [b""], [b"", b"x" * 3_000_000, b"y"]])
def test_a_frame_comes_out_as_it_went_in(blobs: list[bytes]) -> None:
    left, right = socket.socketpair()
    with left, right:
        sender = threading.Thread(target=send, args=(left, {"kind": "é"}, blobs))
        sender.start()
        assert receive(right) == ({"kind": "é"}, blobs)
        sender.join()


def test_who_hangs_up_once_a_frame_is_whole_breaks_nothing() -> None:
    class Hasty(socket.socket):
        """Its peer has answered and gone as soon as it has all bytes of a frame whose blob is empty."""

        calls = 0

        def sendall(self, *given: Any) -> None:
            self.calls += 1
            if self.calls > 1:
                raise BrokenPipeError

    with Hasty() as line:
        send(line, {"kind": "query"}, [b""])
    assert line.calls == 1


@pytest.mark.parametrize(
    ("sent", "said"), [(b"", "closed"), (b"\0" * 7, "closed"), ((MAX_WORDS + 1).to_bytes(8, "big"), "the limit is")]
)
def test_what_is_no_frame_is_refused(sent: bytes, said: str) -> None:
    left, right = socket.socketpair()
    with right:
        with left:
            left.sendall(sent)
        with pytest.raises(ConnectionError, match=said):
            receive(right)
