"""The body of a request, as far as its size and the time it takes stay within limits. Knows no fields."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request

from smartmops.serving.forms import Refused


@dataclass(frozen=True)
class Limits:
    """What one client may take of a server."""

    body: int = 2**20  # bytes of a request's body
    head: float = 20.0  # seconds until the first line and the headers of a request are there
    reading: float = 30.0  # seconds until a body is there
    answer: float = 600.0  # seconds from the last byte of a request to the end of its answer
    writing: float = 30.0  # seconds that a client may leave unread what is sent to it
    connections: int = 512  # that are open at once; well below the number of files that a process may open


class Gone(Exception):
    """The client went away before its request was there."""


async def read(request: Request, limits: Limits) -> bytes:
    """The body of a request.

    Raises:
        Gone: the client went away.
        Refused: it is too large, or too slow.
    """
    declared, chunks, size = request.headers.get("content-length", "0"), list[bytes](), 0
    too_large = Refused(413, f"the body has more than {limits.body} bytes: send less", None, "body_too_large")
    if declared.isdecimal() and int(declared) > limits.body:
        raise too_large
    try:
        async with asyncio.timeout(limits.reading):
            async for chunk in request.stream():
                chunks.append(chunk)
                size += len(chunk)
                if size > limits.body:
                    raise too_large
    except TimeoutError:
        raise Refused(408, f"after {limits.reading:g} s the body has not come, which is the limit: send it at once",
                      None, "request_timeout") from None  # fmt: skip
    except ClientDisconnect:
        raise Gone from None
    return b"".join(chunks)


def parsed(body: bytes) -> Any:
    """The JSON of a body.

    Raises:
        Refused: it is none.
    """
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "the body is no JSON: send a JSON object") from error
