"""A hub on this machine: repositories are made, files are committed, and what was sent is kept."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """What was asked of it."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.made: dict[str, dict[str, Any]] = {}
        self.files: dict[str, dict[str, bytes]] = {}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def _answer(self, status: int, found: Any) -> None:
            body = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            made = hub.made.get(self.path.removeprefix("/api/models/"), {})
            private = made.get("visibility") == "private"
            self._answer(200, {"sha": "0" * 40, "siblings": [], "id": "none", "private": private})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self._answer(401, {"error": "no"})
            path = self.path.split("?")[0]
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                hub.made.setdefault(name, asked)
                return self._answer(200, {"url": f"http://{self.headers['Host']}/{name}", "name": name, "id": name})
            if path == "/api/validate-yaml":
                return self._answer(200, {"errors": [], "warnings": []})
            repo, _, rest = path.removeprefix("/api/models/").partition("/preupload/")
            if rest:
                files = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                         for each in json.loads(body)["files"]]  # fmt: skip
                return self._answer(200, {"files": files})
            repo = path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in body.decode().splitlines():
                said = json.loads(line)
                if said["key"] == "file":
                    content = base64.b64decode(said["value"]["content"])
                    hub.files.setdefault(repo, {})[said["value"]["path"]] = content
            self._answer(
                200,
                {
                    "success": True,
                    "commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{'1' * 40}",
                    "commitOid": "1" * 40,
                },
            )

    return Handler


@contextmanager
def hub(token: str) -> Iterator[tuple[Hub, str]]:
    """A hub that takes one token, and its address."""
    kept = Hub(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(kept))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield kept, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
