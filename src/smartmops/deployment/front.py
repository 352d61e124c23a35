"""The only thing that clients reach: lets Flower's calls for nodes through, and nothing else.

Flower serves its nodes and its operators at one port, and asks operators for no password: who reaches that port may
run code on the server and on every client. So the SuperLink listens on loopback, and this stands before it. Who is
refused is refused by the headers: nothing that a stranger sends after them is read, and nothing of him is kept.
"""

from __future__ import annotations

import asyncio
import math
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smartmops.checks.errors import PortTaken

from .knocks import KNOCK, Door, Knocks, Refused

NODES = re.compile(r"/v1/fleet/[a-z-]+")  # whole paths of Flower's calls for nodes: no dots, no escapes
DEACTIVATE = "/v1/fleet/deactivate-node"
RECENT = 65.0  # seconds of silence after which Flower lets go of a node
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "host", "content-length", "content-encoding", "te",
              "upgrade", "accept-encoding"}  # fmt: skip


@dataclass
class Front:
    """An ASGI application before a SuperLink.

    Attributes:
        upstream: Of the SuperLink, `https://127.0.0.1:PORT`.
        certificate: Of the authority that signed the SuperLink's certificate.
        limit: Bytes of a request's body.
        door: Who is let in.
        knocks: Where it is noted who is not.
        clock: Seconds.
    """

    upstream: str
    certificate: Path
    limit: int
    door: Door
    knocks: Knocks
    clock: Callable[[], float] = time.monotonic
    heard: dict[str, float] = field(default_factory=dict)  # when each client was last heard, until it said goodbye
    _client: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        from starlette.requests import Request
        from starlette.responses import Response

        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        try:
            response = await self._answer(request)
        except Refused as refused:
            self.knocks.note(request.client.host if request.client else "?", refused)
            # Closed, because what may still come of the body is not read; the detail names folders and clients.
            response = Response(refused.kind, refused.status, {"connection": "close"})
        await response(scope, receive, send)

    async def _answer(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        path = request.url.path
        if request.method != "POST" or not NODES.fullmatch(path):
            raise Refused(404, "not for nodes", f"{request.method} {path[:100]!r}")
        name = self.door.admit(request.headers)
        if path == KNOCK:
            quiet = self.clock() - self.heard.get(name, -math.inf)
            if there := quiet < RECENT:
                self.knocks.note(request.client.host, Refused(409, "a client whose key another one uses, or was killed "
                                 "with a minute ago", f"the key is that of {name!r}"))  # fmt: skip
            return JSONResponse({"name": name, "there": there})
        return await self._passed_on(request, name, await self._body(request, name))

    async def _body(self, request: Any, name: str) -> bytes:
        refused = Refused(413, f"a body of more than {self.limit} bytes",
                          f"of {name!r}; --message-limit raises it")  # fmt: skip
        if int(request.headers.get("content-length", 0)) > self.limit:
            raise refused
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self.limit:
                raise refused
        return bytes(body)

    async def _passed_on(self, request: Any, name: str, body: bytes) -> Any:
        from starlette.responses import Response

        path = request.url.path
        passed = {k: v for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP}
        try:
            found = await self._upstream().post(self.upstream + path, content=body, headers=passed)
        except _broken() as error:
            return Response(f"the SuperLink does not answer ({type(error).__name__})", 502)
        if path == DEACTIVATE:
            self.heard.pop(name, None)
        elif found.is_success:
            self.heard[name] = self.clock()
        headers = {k: v for k, v in found.headers.items() if k.lower() not in HOP_BY_HOP}
        return Response(found.content, found.status_code, headers)

    async def close(self) -> None:
        """Hang up on the SuperLink, which would otherwise wait half a minute for it before it ends."""
        self.knocks.sum_up()
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
        PortTaken: the port is taken, or the address is none of this machine's.
    """
    import uvicorn

    config = uvicorn.Config(front, host=host, port=port, ssl_certfile=str(certificate), ssl_keyfile=str(key),
                            log_level="critical", lifespan="off", access_log=False)  # fmt: skip
    # Made here: uvicorn's own way would end this whole process where a port is taken.
    try:
        bound = socket.create_server((host, port))
    except OSError as error:
        raise PortTaken(f"--host {host} --port {port} cannot be had ({error.strerror or error}): choose another port, "
                        "or an address of this machine") from error  # fmt: skip
    with bound as listener:
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
