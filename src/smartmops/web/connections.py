"""One client's connection, with an end to what it may keep waiting: its head, its reading, its number.

Knows uvicorn's protocol for HTTP/1.1 and its callbacks. Knows no routes. A body has its limits in `bodies`.
"""

from __future__ import annotations

import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from smartmops.serving.forms import Refused

from .bodies import Limits

Timer = Any  # the loop's: uvloop's are no subclass of asyncio's, and neither are its transports
RETRY = 2  # seconds after which a client may try again
PHRASES = {400: "Bad Request", 503: "Service Unavailable"}


class Connection(H11Protocol):
    """uvicorn's connection, which waits for a client's next byte only as long as the limits say.

    uvicorn itself puts a limit on the pause between two requests alone: a client that sends half a head, or reads
    nothing of its answer, would keep its connection for as long as it likes.
    """

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limits = limits
        self._head: Timer = None
        self._unread: Timer = None

    def connection_made(self, transport: Any) -> None:
        """A client is there; one too many is sent away."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            why = f"{self.limits.connections} connections are open, which is the limit: try again later"
            self._turn_away(Refused(503, why, None, "too_many_connections", RETRY))
        else:
            self._expect()

    def data_received(self, data: bytes) -> None:
        """Bytes of a client. One head has so much time for all its bytes, so that a trickle does not prolong it."""
        super().data_received(data)
        self._expect()

    def _expect(self) -> None:
        """A head is awaited from here on, or is no longer."""
        if not self._awaited:
            _cancel(self._head)
            self._head = None
        elif self._head is None and not self.transport.is_closing():
            self._head = self.loop.call_later(self.limits.head, self._late)

    @property
    def _awaited(self) -> bool:
        """Whether no request is under way: what comes is a head, or the rest of a body that was refused."""
        return self.cycle is None or self.cycle.response_complete

    def _late(self) -> None:
        self._head = None
        if self._awaited:
            self.transport.abort()

    def pause_writing(self) -> None:
        """So much is unread that no more is written."""
        super().pause_writing()
        _cancel(self._unread)
        self._unread = self.loop.call_later(self.limits.writing, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads."""
        super().resume_writing()
        _cancel(self._unread)

    def on_response_complete(self) -> None:
        """An answer is written; a connection that ends with it ends although nobody reads it."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._abort_later()

    def timeout_keep_alive_handler(self) -> None:
        """No further request came."""
        super().timeout_keep_alive_handler()
        self._abort_later()

    def _abort_later(self) -> None:
        """A transport that is closed stays open until its last byte is read: not for longer than the limit."""
        self.loop.call_later(self.limits.writing, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._turn_away(Refused(400, f"{msg.rstrip('.')}: send HTTP/1.1", None, "no_http"))
        else:  # an answer is half written
            self.transport.abort()

    def _turn_away(self, refused: Refused) -> None:
        """Say why, and close."""
        body = json.dumps(refused.body).encode()
        retry = "" if refused.retry is None else f"retry-after: {refused.retry}\r\n"
        head = (f"HTTP/1.1 {refused.status} {PHRASES[refused.status]}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\n{retry}connection: close\r\n\r\n")  # fmt: skip
        self.transport.write(head.encode() + body)
        if self.cycle is not None:
            self.cycle.disconnected = True  # so that whoever answers writes nothing into it
            self.cycle.message_event.set()
        self.transport.close()
        self._abort_later()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        _cancel(self._head)
        _cancel(self._unread)
        super().connection_lost(exc)


def _cancel(timer: Timer) -> None:
    if timer is not None:
        timer.cancel()
