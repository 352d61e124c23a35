"""The only thing that clients reach: lets Flower's calls for nodes through, and nothing else.

Flower serves its nodes and its operators at one port, and asks operators for no password: who reaches that port may
run code on the server and on every client. So the SuperLink listens on loopback, and this stands before it. It also
refuses what is too large, and a signed request that was seen before.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NODES = re.compile(r"/v1/fleet/[a-z-]+")  # whole paths of Flower's calls for nodes: no dots, no escapes
SIGNATURE = "flwr-signature"  # header of a node's signature of the time
REMEMBERED = 900.0  # seconds; Flower takes signatures that are 5 minutes old
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "host", "content-length", "content-encoding", "te",
              "upgrade", "accept-encoding"}  # fmt: skip


@dataclass
class Front:
    """An ASGI application before a SuperLink.

    Attributes:
        upstream: Of the SuperLink, `https://127.0.0.1:PORT`.
        certificate: Of the authority that signed the SuperLink's certificate.
        limit: Bytes of a request's body.
    """

    upstream: str
    certificate: Path
    limit: int
    seen: dict[str, float] = field(default_factory=dict)
    _client: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        from starlette.requests import Request

        if scope["type"] == "http":
            response = await self._answer(Request(scope, receive))
            await response(scope, receive, send)

    async def _answer(self, request: Any) -> Any:
        from starlette.responses import Response

        if request.method != "POST" or not NODES.fullmatch(request.url.path):
            return Response("not for nodes", 404)
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self.limit:
                return Response(f"a body of more than {self.limit} bytes", 413)
        if not self._fresh(request.headers.get(SIGNATURE)):
            return Response("no signature, or one that was seen before", 401)
        passed = {k: v for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP}
        try:
            found = await self._upstream().post(self.upstream + request.url.path, content=bytes(body), headers=passed)
        except _broken() as error:
            return Response(f"the SuperLink does not answer ({type(error).__name__})", 502)
        headers = {k: v for k, v in found.headers.items() if k.lower() not in HOP_BY_HOP}
        return Response(found.content, found.status_code, headers)

    def _fresh(self, signature: str | None) -> bool:
        """Whether there is one that was not seen before; remembers it."""
        now = time.monotonic()
        for old in [old for old, when in self.seen.items() if now - when > REMEMBERED]:
            del self.seen[old]
        if signature is None or signature in self.seen:
            return False
        self.seen[signature] = now
        return True

    async def close(self) -> None:
        """Hang up on the SuperLink, which would otherwise wait half a minute for it before it ends."""
        if self._client is not None:
            await self._client.aclose()

    def _upstream(self) -> Any:
        import httpx

        if self._client is None:
            context = ssl.create_default_context(cafile=str(self.certificate))
            self._client = httpx.AsyncClient(verify=context, timeout=60.0)
        return self._client


def _broken() -> type[Exception]:
    import httpx

    return httpx.TransportError


@contextmanager
def standing(front: Front, host: str, port: int, certificate: Path, key: Path) -> Iterator[None]:
    """Serves over TLS in a thread of its own.

    Raises:
        OSError: the port is taken, or the address is none of this machine's.
    """
    import uvicorn

    config = uvicorn.Config(front, host=host, port=port, ssl_certfile=str(certificate), ssl_keyfile=str(key),
                            log_level="critical", lifespan="off", access_log=False)  # fmt: skip
    # Made here: uvicorn's own way would end this whole process where a port is taken.
    with socket.create_server((host, port)) as listener:
        server = uvicorn.Server(config)

        async def run() -> None:
            try:
                await server.serve([listener])
            finally:
                await front.close()

        thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.should_exit = True
            thread.join(10)
