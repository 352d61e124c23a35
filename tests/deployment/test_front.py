"""The front without a SuperLink behind it: what it says of one that is gone, and where it cannot stand."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import httpx
import pytest

from smartmops.deployment.client import free_port
from smartmops.deployment.front import SIGNATURE, Front, standing
from smartmops.deployment.keys import KeysConfig, make_keys
from smartmops.deployment.server import ServerConfig, _superlink


@pytest.fixture(scope="module")
def server_keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make_keys(KeysConfig(out=folder, clients=("berlin",)))
    return folder / "server"


def front(keys: Path) -> Front:
    return Front(f"https://127.0.0.1:{free_port()}", keys / "ca.crt", 1000)


def test_while_the_superlink_is_gone_nodes_are_told_to_come_back(server_keys: Path) -> None:
    port = free_port()
    context = ssl.create_default_context(cafile=str(server_keys / "ca.crt"))
    with (
        standing(front(server_keys), "127.0.0.1", port, server_keys / "server.crt", server_keys / "server.key"),
        httpx.Client(verify=context, base_url=f"https://localhost:{port}") as session,
    ):
        path = "/v1/fleet/pull-messages"
        found = session.post(path, headers={SIGNATURE: "one"})
        assert found.status_code == 502 and "does not answer" in found.text  # Flower's nodes try again after a 502
        assert session.post(path, headers={SIGNATURE: "one"}).status_code == 401
        assert session.post(path).status_code == 401
        assert session.post(path, headers={SIGNATURE: "two"}, content=bytes(1001)).status_code == 413


def test_a_port_that_is_taken_is_an_error_here(server_keys: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(OSError, match="in use"),
        standing(front(server_keys), "127.0.0.1", taken.getsockname()[1], server_keys / "server.crt",
                 server_keys / "server.key"),
    ):  # fmt: skip
        pytest.fail("stood")


@pytest.mark.slow
def test_a_superlink_that_cannot_start_is_an_error_that_names_its_log(server_keys: Path, tmp_path: Path) -> None:
    broken = tmp_path / "server"
    broken.mkdir()
    for file in server_keys.glob("*.*"):
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "server.key").write_text("no key")
    settings = ServerConfig(model="tiny", data="office", out=tmp_path, keys=broken, clients=1, clients_per_round=1,
                            host="127.0.0.1", port=free_port())  # fmt: skip
    with pytest.raises(ConnectionError, match=r"did not start: see .*superlink\.log"), _superlink(settings, tmp_path):
        pytest.fail("started")
