"""The front without a SuperLink behind it: what it says of one that is gone, and where it cannot stand."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from smartmops.deployment.client import free_port
from smartmops.deployment.front import Front, standing
from smartmops.deployment.keys import KeysConfig, make_keys, signed_now
from smartmops.deployment.knocks import SIGNATURE, Door, Keyring, Knocks
from smartmops.deployment.server import ServerConfig, _superlink


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make_keys(KeysConfig(out=folder, clients=("berlin",)))
    return folder


@pytest.fixture
def server_keys(keys: Path) -> Path:
    return keys / "server"


def front(keys: Path, said: list[str] | None = None) -> Front:
    said = [] if said is None else said
    door = Door(Keyring(keys / "clients"))
    return Front(f"https://127.0.0.1:{free_port()}", keys / "ca.crt", 1000, door, Knocks(said.append))


@pytest.fixture
def said() -> list[str]:
    """What the server's operator is told."""
    return []


@pytest.fixture
def stood(server_keys: Path, said: list[str]) -> Iterator[tuple[Front, int]]:
    """A front, and its port."""
    port, found = free_port(), front(server_keys, said)
    with standing(found, "127.0.0.1", port, server_keys / "server.crt", server_keys / "server.key"):
        yield found, port


@pytest.fixture
def post(stood: tuple[Front, int], server_keys: Path) -> Iterator[Callable[..., httpx.Response]]:
    context = ssl.create_default_context(cafile=str(server_keys / "ca.crt"))
    with httpx.Client(verify=context, base_url=f"https://localhost:{stood[1]}", timeout=600) as session:
        yield session.post


PULL = "/v1/fleet/pull-messages"


def test_while_the_superlink_is_gone_nodes_are_told_to_come_back(
    post: Callable[..., httpx.Response], keys: Path
) -> None:
    own = keys / "clients" / "berlin" / "client.key"
    headers = signed_now(own)
    found = post(PULL, headers=headers)
    assert found.status_code == 502 and "does not answer" in found.text  # Flower's nodes try again after a 502
    assert post(PULL, headers=headers).status_code == 401
    assert post(PULL).status_code == 401
    assert post(PULL, headers=signed_now(own), content=bytes(1001)).status_code == 413


def answered(stood: tuple[Front, int], keys: Path, head: dict[str, str], body: bytes = b"") -> bytes:
    """The first line of the answer to a request of which no more than this is ever sent."""
    context = ssl.create_default_context(cafile=str(keys / "server" / "ca.crt"))
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    with (
        socket.create_connection(("127.0.0.1", stood[1]), 30) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as line,
    ):
        line.sendall(f"POST {PULL} HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode() + body)
        return line.recv(1000).partition(b"\r\n")[0]


HUGE = {"Content-Length": str(10**15)}
ENDLESS = {"Transfer-Encoding": "chunked"}


@pytest.mark.parametrize("promise", [HUGE, {"Content-Length": "1001"}, ENDLESS])
def test_who_is_refused_is_refused_by_the_headers_before_any_body_is_read(
    stood: tuple[Front, int], keys: Path, said: list[str], promise: dict[str, str], tmp_path: Path
) -> None:
    assert b" 401 " in answered(stood, keys, promise)
    make_keys(KeysConfig(out=tmp_path, clients=("mallory",)))
    assert b" 401 " in answered(stood, keys, promise | signed_now(tmp_path / "clients" / "mallory" / "client.key"))
    assert stood[0].door.used == {}
    assert said[0] == "refused 127.0.0.1: no signature"
    assert said[1].startswith("refused 127.0.0.1: a key that is none of the clients'")


@pytest.mark.parametrize(
    ("promise", "body"), [(HUGE, b""), ({"Content-Length": "1001"}, b""), (ENDLESS, b"3e9\r\n" + bytes(1001))]
)
def test_a_body_above_the_limit_is_answered_as_soon_as_that_is_known(
    stood: tuple[Front, int], keys: Path, said: list[str], promise: dict[str, str], body: bytes
) -> None:
    own = signed_now(keys / "clients" / "berlin" / "client.key")
    assert b" 413 " in answered(stood, keys, promise | own, body)
    assert said == ["refused 127.0.0.1: a body of more than 1000 bytes: of 'berlin'; --message-limit raises it"]


def test_what_is_not_for_nodes_is_noted(post: Callable[..., httpx.Response], said: list[str]) -> None:
    assert post("/v1/control/list-runs[bold]").status_code == 404
    assert said == ["refused 127.0.0.1: not for nodes: POST '/v1/control/list-runs[bold]'"]


def test_a_stranger_hears_the_kind_alone_and_the_operator_all(
    post: Callable[..., httpx.Response], keys: Path, said: list[str], tmp_path: Path
) -> None:
    make_keys(KeysConfig(out=tmp_path, clients=("mallory",)))
    strange, own = (signed_now(place / "client.key")
                    for place in (tmp_path / "clients" / "mallory", keys / "clients" / "berlin"))  # fmt: skip
    for headers, kind, detail in (
        (strange, "a key that is none of the clients'", f"no file in {keys / 'server' / 'clients'} holds it"),
        (own | {SIGNATURE: strange[SIGNATURE]}, "a signature that does not fit its key", "the key is that of 'berlin'"),
    ):
        assert post(PULL, headers=headers).text == kind
        assert said.pop() == f"refused 127.0.0.1: {kind}: {detail}"


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
