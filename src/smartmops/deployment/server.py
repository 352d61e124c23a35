"""`smartmops federate-server`: the round loop here, a SuperLink of Flower beside it, clients somewhere over TLS.

The model stays in this process: Flower's ServerApp is a relay that reaches it through a socket of this user's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from smartmops.checks.errors import FederationUnreachable, MissingExtra
from smartmops.checks.limits import check
from smartmops.clients.messages import Transport
from smartmops.federated.federate import federate
from smartmops.flower.transport import OverFlower, OverSocket
from smartmops.options.federation import FederateConfig, ServerConfig
from smartmops.progress.bars import console

from .client import beside, free_port, surroundings
from .front import Front, standing
from .guard import guarded
from .knocks import Door, Keyring, Knocks

TRAVELS = ("__init__.py", "app.py", "frames.py")  # of the room `flower`, in Flower's app bundle
STARTING = 60.0  # seconds that Flower's own processes may take to come up

APP = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "smartmops-relay"
version = "1.0.0"
description = "Carries smartmops messages; the model is elsewhere."
license = "Apache-2.0"
dependencies = ["flwr"]

[tool.flwr.app]
publisher = "smartmops"

[tool.flwr.app.components]
serverapp = "relay.app:server"
clientapp = "relay.app:client"

[tool.flwr.app.config]
socket = "{socket}"
"""
CONNECTION = """[superlink]
default = "ours"

[superlink.ours]
address = "{address}"
root-certificates = "{certificate}"
"""


def federate_server(config: ServerConfig) -> dict[str, Any]:
    """`federate` over clients that run `smartmops federate-client`; the run folder is the same.

    Raises:
        MissingExtra: Flower is not installed.
        FederationError: settings, keys or clients do not fit.
        FederationTimeout: too few clients came.
        QuorumLost: too few answered, again and again.
        FederationUnreachable: Flower did not start, or died.
    """
    _check(config)
    home = config.out.parent / f".{config.out.name}.flower"
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="smartmops-") as folder, _superlink(config, home):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.closing(listener):
            listener.bind(f"{folder}/server")
            os.chmod(f"{folder}/server", 0o600)
            listener.listen(1)

            def connect(given: FederateConfig) -> Transport:
                return Deployed(config, home, Path(folder), listener)

            own = {f.name: getattr(config, f.name) for f in fields(FederateConfig)}
            metrics = federate(FederateConfig(**own), connect)
    shutil.rmtree(home)
    return metrics


def _check(config: ServerConfig) -> None:
    from importlib.util import find_spec

    if not find_spec("flwr"):
        raise MissingExtra("a real federation needs Flower: pip install 'smartmops[federated]'")
    check(config)


@contextmanager
def _superlink(config: ServerConfig, home: Path) -> Iterator[None]:
    """Flower's server, the clients' keys registered with it."""
    keys, port = config.keys.resolve(), free_port()
    address, certificate = f"127.0.0.1:{port}", keys / "ca.crt"
    (home / "config.toml").write_text(CONNECTION.format(address=address, certificate=certificate))
    command = [
        beside("flower-superlink"), "--host", "127.0.0.1", "--port", str(port), "--ssl-ca-certfile",
        str(keys / "ca.crt"), "--ssl-certfile", str(keys / "server.crt"), "--ssl-keyfile", str(keys / "server.key"),
        "--enable-supernode-auth", "--database", str(home.resolve() / "state.db"),
        "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    front = Front(f"https://{address}", certificate, 1_000_000 * config.message_limit, Door(Keyring(keys / "clients")),
                  Knocks(lambda line: _noted(line, home / "front.log")))  # fmt: skip
    with (
        open(home / "superlink.log", "ab") as log,
        guarded(command, env=surroundings(home), stdout=log, stderr=log) as link,
    ):
        _listening(port, home, link)
        for key in sorted((keys / "clients").glob("*.pub")):
            _register(key, home)
        with standing(front, config.host, config.port, keys / "server.crt", keys / "server.key"):
            console.print(f"listening on {config.host}:{config.port} for {config.clients} clients; Flower's log is "
                          f"{home / 'superlink.log'}, who was refused stands in {home / 'front.log'}")  # fmt: skip
            yield


def _noted(line: str, file: Path) -> None:
    """Who was refused, to the operator and to a file; a full disk is no reason to stop."""
    console.print(line, highlight=False)
    with contextlib.suppress(OSError), file.open("a") as log:
        log.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {line}\n")


def _listening(port: int, home: Path, link: subprocess.Popen[bytes]) -> None:
    """Returns once the SuperLink takes calls."""
    end = time.monotonic() + STARTING
    while link.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise FederationUnreachable(f"Flower's SuperLink did not start: see {home / 'superlink.log'}")


def _register(key: Path, home: Path) -> None:
    found = _flwr(["supernode", "register", str(key), "--name", key.stem], home)
    if found.returncode and "already" not in found.stdout.lower():
        raise FederationUnreachable(f"Flower's SuperLink did not take the key {key}: see {home / 'superlink.log'} "
                                    f"({' '.join(found.stdout.split())[-300:]})")  # fmt: skip


def _flwr(words: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [beside("flwr"), *words], env=surroundings(home), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


class Deployed(OverFlower):
    """Clients over the network, reached through the relay that Flower runs as its ServerApp."""

    def __init__(self, config: ServerConfig, home: Path, folder: Path, listener: socket.socket) -> None:
        bundle = folder / "relay-app"
        (bundle / "relay").mkdir(parents=True)
        for name in TRAVELS:
            (bundle / "relay" / name).write_text((files("smartmops.flower") / name).read_text())
        (bundle / "pyproject.toml").write_text(APP.format(socket=folder / "server"))
        started = _flwr(["run", str(bundle), "ours"], home)
        if started.returncode:
            raise FederationUnreachable(f"Flower did not take the relay: {' '.join(started.stdout.split())[-300:]}")
        listener.settimeout(STARTING)
        try:
            self.line, _ = listener.accept()
        except TimeoutError as error:
            raise FederationUnreachable(f"Flower did not start the relay: see {home / 'superlink.log'}") from error
        self.line.settimeout(None)
        super().__init__(OverSocket(self.line), config.clients, config.patience)

    def close(self) -> None:
        """The relay ends when its line does."""
        self.line.close()
