"""A server in a thread of the tests' own process, on a real socket."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from smartmops.serving.batching import Batcher
from smartmops.web.server import Server, Site, make_app

APPLE = [{"role": "user", "content": "apple number 3."}]


class Served:
    """A server in a thread."""

    def __init__(self, answerer: Any, room: int = 64, keys: tuple[str, ...] = (), started: bool = True) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))  # clients may come before the server is there
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.batcher = Batcher(answerer, room=room)
        if started:
            self.batcher.start()
        site = Site(answerer, self.batcher, 32, list(keys))
        self.server = Server(make_app(site), self.batcher, lambda: None)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()

    def end(self) -> None:
        self.server.handle_exit(signal.SIGTERM, None)
        self.batcher.cancel()
        self.thread.join(60)
        self.batcher.join()
        assert not self.thread.is_alive()


@contextmanager
def serving(*args: Any, **kwargs: Any) -> Iterator[Served]:
    found = Served(*args, **kwargs)
    try:
        yield found
    finally:
        found.end()
