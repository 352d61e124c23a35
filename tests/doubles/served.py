"""A server in a thread of the tests' own process, on a real socket."""

from __future__ import annotations

import functools
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from smartmops.serving.batching import Batcher
from smartmops.web.bodies import Limits
from smartmops.web.server import Server, Site, make_app

PATIENT = 600  # seconds that a client waits: on a busy machine httpx's own 5 are too few
get, post = (functools.partial(each, timeout=PATIENT) for each in (httpx.get, httpx.post))
APPLE = [{"role": "user", "content": "apple number 3."}]


class Served:
    """A server in a thread."""

    def __init__(
        self, answerer: Any, room: int = 64, keys: tuple[str, ...] = (), started: bool = True, most: int = 32,
        limits: Limits | None = None, size: int = 16,
    ) -> None:  # fmt: skip
        self.socket = socket.create_server(("127.0.0.1", 0))  # clients may come before the server is there
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.answerer, self.batcher = answerer, Batcher(answerer, size, room)
        if started:
            self.batcher.start()
        self.site = Site(answerer, self.batcher, most, list(keys), limits)
        self.app = make_app(self.site)
        self.server = Server(self.app, self.batcher, lambda: None, limits)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()

    def end(self) -> None:
        self.server.handle_exit(signal.SIGTERM, None)
        self.batcher.cancel()
        self.thread.join(600)
        self.batcher.join()
        assert not self.thread.is_alive()


@contextmanager
def serving(*args: Any, **kwargs: Any) -> Iterator[Served]:
    found = Served(*args, **kwargs)
    try:
        yield found
    finally:
        found.end()


def wait_for(what: Any) -> None:
    """Until it is so; a test whose server hangs fails."""
    pause = threading.Event()
    for _ in range(60_000):
        if what():
            return
        pause.wait(0.01)
    raise AssertionError("it did not come to it")
