"""A real federation on loopback: a SuperLink, SuperNodes, TLS, node keys. The same arrays as plain calls, and who is refused.

Only the models are this process's own: a client is its worker and a real SuperNode beside it.
"""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from safetensors.torch import load_file

from smartmops.checks.errors import ClientsRefused
from smartmops.clients.messages import Reply, pack, unpack
from smartmops.deployment import client as client_module
from smartmops.deployment import server as server_module
from smartmops.deployment.client import ClientConfig, federate_client, free_port, serving, supernode
from smartmops.deployment.front import Front
from smartmops.deployment.keys import KeysConfig, make_keys
from smartmops.deployment.server import ServerConfig, _superlink, federate_server
from smartmops.federated.federate import FederateConfig, federate
from smartmops.federated.rounds import State
from smartmops.runs.folder import Run

Make = Callable[..., FederateConfig]
Change = Callable[[str, bytes, bytes], bytes]  # kind, job and honest answer in, what is sent out


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make_keys(KeysConfig(out=folder, clients=("both", "only_a", "only_b")))
    return folder


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Path:
    """Keys nobody registered, with the right authority."""
    folder = tmp_path_factory.mktemp("strangers")
    make_keys(KeysConfig(out=folder, clients=("mallory",)))
    own = folder / "clients" / "mallory"
    (own / "ca.crt").write_bytes((keys / "server" / "ca.crt").read_bytes())
    return own


@contextmanager
def client(config: ClientConfig, folder: Path, change: Change | None = None) -> Iterator[subprocess.Popen[bytes]]:
    worker = client_module.worker_of_file(config)
    path = str(folder / f"{config.data.stem}.socket")

    def answer(kind: str, blob: bytes) -> bytes:
        honest = client_module._said(worker, kind, blob)
        return honest if change is None else change(kind, blob, honest)

    with serving(path, answer), supernode(config, path) as node:
        yield node


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SuperNodes without pauses."""
    program, beside = tmp_path / "flower-supernode", client_module.beside
    program.write_text(
        f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parents[1] / "doubles" / "impatient.py"} "$@"\n'
    )
    program.chmod(0o700)
    monkeypatch.setattr(client_module, "beside", lambda name: str(program) if name == program.name else beside(name))


@pytest.fixture
def federation(
    config: Make,
    clients_folder: Path,
    keys: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    impatient: None,
) -> Iterator[Callable[..., dict[str, Any]]]:
    """Runs a deployed federation over the three files; `changes` says who lies, and how."""
    sockets, port = tmp_path_factory.mktemp("s"), free_port()
    with ExitStack() as stack:

        def run(changes: dict[str, Change] | None = None, **settings: Any) -> dict[str, Any]:
            plain = config(clients_data=clients_folder, out=tmp_path / "deployed", **settings)
            given = {f.name: getattr(plain, f.name) for f in fields(FederateConfig)}
            server = ServerConfig(**given | {"keys": keys / "server", "clients": 3, "host": "127.0.0.1",
                                             "port": port, "clients_data": None})  # fmt: skip
            for file in sorted(clients_folder.glob("*.jsonl")):
                own = ClientConfig(model=plain.model, data=file, server=f"localhost:{server.port}",
                                   keys=keys / "clients" / file.stem, max_length=plain.max_length)  # fmt: skip
                if file.stem in nodes:
                    continue
                nodes[file.stem] = stack.enter_context(client(own, sockets, (changes or {}).get(file.stem)))
            return federate_server(server)

        nodes: dict[str, subprocess.Popen[bytes]] = {}
        run.nodes = nodes  # type: ignore[attr-defined]
        yield run


@pytest.mark.slow
def test_a_federation_over_tls_whose_server_is_killed_ends_with_the_bits_of_plain_calls(
    federation: Callable[..., dict[str, Any]], config: Make, clients_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    class Killed(BaseException):
        """As kill -9."""

    save = State.save

    def killed(state: State, file: Path) -> None:
        if state.round == 2:
            raise Killed
        save(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(State, "save", killed)
        with pytest.raises(Killed):
            federation(rounds=2)
    nodes = list(federation.nodes.values())  # type: ignore[attr-defined]
    found = federation(rounds=2, resume=True)
    assert [node.poll() for node in nodes] == [None] * 3 == [node.poll() for node in federation.nodes.values()]  # type: ignore[attr-defined]
    plain = federate(config(clients_data=clients_folder, out=tmp_path / "plain", rounds=2))
    wanted = load_file(tmp_path / "plain" / "adapter" / "adapter_model.safetensors")
    arrays = load_file(tmp_path / "deployed" / "adapter" / "adapter_model.safetensors")
    assert wanted.keys() == arrays.keys() and all(torch.equal(wanted[name], arrays[name]) for name in wanted)
    assert (found["clients"], found["clients_failed"]) == (3, 0)
    assert found["perplexity"] == plain["perplexity"]
    assert found["bytes_down"] == plain["bytes_down"]


@pytest.mark.slow
def test_rounds_go_on_without_who_sends_too_much_or_an_old_answer_or_is_killed_in_the_middle(
    federation: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    kept: list[bytes] = []

    def oversized(kind: str, job: bytes, honest: bytes) -> bytes:
        reply = unpack(honest)
        liar = isinstance(reply, Reply) and reply.round == 1
        return pack(replace(reply, arrays={"x": torch.zeros(1 << 22)})) if liar else honest

    def replayed(kind: str, job: bytes, honest: bytes) -> bytes:
        kept.extend([honest] if kind == "train" else [])
        return kept[0] if kept else honest

    def killed(kind: str, job: bytes, honest: bytes) -> bytes:
        reply = unpack(honest)
        if isinstance(reply, Reply) and reply.round == 2:
            nodes["both"].kill()
        return honest

    nodes = federation.nodes  # type: ignore[attr-defined]
    changes = {"only_a": oversized, "only_b": replayed, "both": killed}
    # Without a time limit, so that who is honest is never late: Flower says who is dead, once two heartbeats are missing.
    found = federation(changes, rounds=2, quorum=1)
    assert [(row["clients_ok"], row["clients_failed"]) for row in found["rounds"][1:]] == [(2, 1), (1, 2)]
    first, second = [{each["client"]: each["reason"] for each in row["failures"]}
                     for row in Run.open(tmp_path / "deployed").read_curves()[1:]]  # fmt: skip
    assert "bytes; the limit is" in first[1]
    assert "answered round 1" in second[2] and second[0].startswith("Flower: ")


@pytest.mark.slow
def test_a_client_with_another_base_is_told_and_ends_and_the_others_stay(
    federation: Callable[..., dict[str, Any]], config: Make, clients_folder: Path, keys: Path,
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    ended: list[int] = []
    ports: list[int] = []

    def other(own: ServerConfig) -> None:
        settings = ClientConfig(model=own.model, data=clients_folder / "both.jsonl", server=f"localhost:{own.port}",
                                keys=keys / "clients" / "both", max_length=96, dtype="bfloat16")  # fmt: skip
        ended.append(federate_client(settings))

    nodes = federation.nodes  # type: ignore[attr-defined]
    nodes["both"] = None  # not of the fixture's
    inner = server_module.federate_server

    def both(own: ServerConfig) -> dict[str, Any]:
        ports.append(own.port)
        threads.append(threading.Thread(target=other, args=(own,)))
        threads[0].start()
        return inner(own)

    threads: list[threading.Thread] = []
    monkeypatch.setattr(sys.modules[__name__], "federate_server", both)
    with pytest.raises(ClientsRefused, match="'both' has another base"):
        federation(rounds=1)
    threads[0].join(600)
    assert ended == [1] and [nodes[name].poll() for name in ("only_a", "only_b")] == [None, None]
    shown = " ".join(capfd.readouterr().out.split())
    assert f"the server at localhost:{ports[0]} refuses this client: client 'both' has another base model" in shown


@pytest.fixture(scope="module")
def link(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A SuperLink behind its front; yields the port."""
    port = free_port()
    settings = ServerConfig(
        model="tiny", data="office", out=Path("unused"), keys=keys / "server", clients=3, clients_per_round=3,
        host="127.0.0.1", port=port, message_limit=1,
    )  # fmt: skip
    with _superlink(settings, tmp_path_factory.mktemp("home")):
        yield port


def signed(key: Path, seconds_ago: float = 0.0) -> dict[str, str]:
    """Headers as a SuperNode makes them."""
    from flwr.supercore.date import now
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

    private = load_ssh_private_key((key / "client.key").read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    when = (now() - timedelta(seconds=seconds_ago)).isoformat()
    return {
        "flwr-public-key": b64encode(public_key_to_bytes(private.public_key())).decode(), "flwr-timestamp": when,
        "flwr-signature": b64encode(sign_message(private, when.encode())).decode(),
        "content-type": "application/protobuf", "accept": "application/protobuf",
    }  # fmt: skip


def activation(key: Path) -> bytes:
    from flwr.proto.fleet_pb2 import ActivateNodeRequest
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    private = load_ssh_private_key((key / "client.key").read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    request = ActivateNodeRequest(public_key=public_key_to_bytes(private.public_key()), heartbeat_interval=30.0)
    return bytes(request.SerializeToString())


@pytest.fixture
def post(link: int, keys: Path) -> Iterator[Callable[..., httpx.Response]]:
    context = ssl.create_default_context(cafile=str(keys / "server" / "ca.crt"))
    with httpx.Client(verify=context, base_url=f"https://localhost:{link}", timeout=600) as session:
        yield lambda path, content, headers: session.post(path, content=content, headers=headers)


ACTIVATE = "/v1/fleet/activate-node"


@pytest.mark.slow
def test_who_has_the_key_is_let_in_and_nobody_else(
    post: Callable[..., httpx.Response], keys: Path, stranger: Path
) -> None:
    own = keys / "clients" / "both"
    assert post(ACTIVATE, activation(own), signed(own)).status_code == 200
    assert post(ACTIVATE, activation(stranger), signed(stranger)).status_code == 401  # a key, but nobody's
    assert post(ACTIVATE, activation(own), signed(stranger)).status_code == 401  # another's name, one's own key
    forged = signed(stranger) | {"flwr-public-key": signed(own)["flwr-public-key"]}
    assert post(ACTIVATE, activation(own), forged).status_code == 401
    nothing = {k: v for k, v in signed(own).items() if not k.startswith("flwr")}
    assert post(ACTIVATE, activation(own), nothing).status_code == 401  # no key


@pytest.mark.slow
def test_a_request_is_taken_once(post: Callable[..., httpx.Response], keys: Path) -> None:
    own = keys / "clients" / "only_a"
    headers, body = signed(own), activation(own)
    assert post(ACTIVATE, body, headers).status_code == 200
    assert post(ACTIVATE, body, headers).status_code == 401
    assert post(ACTIVATE, body, signed(own, seconds_ago=400)).status_code == 401  # recorded before the server was up


@pytest.mark.slow
def test_what_is_too_large_is_refused(post: Callable[..., httpx.Response], keys: Path) -> None:
    own = keys / "clients" / "both"
    assert post("/v1/fleet/push-messages", bytes(1_000_001), signed(own)).status_code == 413
    assert post("/v1/fleet/push-messages", bytes(1_000_001), {}).status_code == 401


@pytest.mark.slow
def test_operators_calls_do_not_come_through(post: Callable[..., httpx.Response], keys: Path) -> None:
    for path in ("/v1/control/start-run", "/v1/control/list-runs", "/v1/runtime/get-nodes", "/docs", "/health"):
        assert post(path, b"", signed(keys / "clients" / "both")).status_code == 404


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", ["/v1/fleet/../control/list-runs", "/v1/fleet/%2e%2e/control/list-runs", "/v1/fleet//x"]
)
def test_no_path_leads_around_the_front(link: int, keys: Path, path: str) -> None:
    context = ssl.create_default_context(cafile=str(keys / "server" / "ca.crt"))
    head = "".join(f"{name}: {value}\r\n" for name, value in signed(keys / "clients" / "both").items())
    with (
        socket.create_connection(("localhost", link), 10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as line,
    ):
        line.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\n{head}Content-Length: 0\r\n\r\n".encode())
        assert b" 404 " in line.recv(100)


@pytest.mark.slow
def test_plaintext_and_a_foreign_authority_are_refused(link: int, stranger: Path, keys: Path) -> None:
    with socket.create_connection(("localhost", link), 10) as line:
        line.sendall(b"POST /v1/fleet/activate-node HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        answer = line.recv(100)
    assert not answer.startswith(b"HTTP")
    foreign = ssl.create_default_context(cafile=str(stranger.parents[1] / "server" / "ca.crt"))
    with pytest.raises(httpx.ConnectError, match="certificate"):
        httpx.post(f"https://localhost:{link}{ACTIVATE}", verify=foreign, content=b"", timeout=600)


@pytest.mark.slow
def test_a_client_with_an_unknown_key_ends_with_an_error(
    link: int, stranger: Path, base_folder: Path, clients_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "ATTEMPTS", 1)
    settings = ClientConfig(model=str(base_folder), data=clients_folder / "both.jsonl", keys=stranger,
                            server=f"localhost:{link}", max_length=96)  # fmt: skip
    assert federate_client(settings) != 0


@pytest.mark.slow
def test_a_client_whose_key_is_taken_back_while_it_runs_says_so_and_ends(
    tmp_path: Path, base_folder: Path, clients_folder: Path, capfd: pytest.CaptureFixture[str], impatient: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    make_keys(KeysConfig(out=tmp_path / "keys", clients=("both", "other")))
    known, port = tmp_path / "keys" / "server" / "clients" / "both.pub", free_port()
    server = ServerConfig(model="tiny", data="office", out=Path("unused"), keys=tmp_path / "keys" / "server", clients=2,
                          clients_per_round=2, host="127.0.0.1", port=port)  # fmt: skip
    own = ClientConfig(model=str(base_folder), data=clients_folder / "both.jsonl", server=f"localhost:{port}",
                       keys=tmp_path / "keys" / "clients" / "both", max_length=96)  # fmt: skip
    passed_on = Front._passed_on

    async def then_taken_back(front: Front, request: Any, name: str, body: bytes) -> Any:
        found = await passed_on(front, request, name, body)
        if request.url.path.endswith("/pull-messages"):
            known.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Front, "_passed_on", then_taken_back)
    (tmp_path / "home").mkdir()
    with _superlink(server, tmp_path / "home"):
        assert federate_client(own) == 1
    shown = " ".join(capfd.readouterr().out.split())
    assert "client.key (a key that is none of the clients'): ask its operator whether the key is still" in shown


def test_bad_settings_are_refused_before_any_model_is_loaded(keys: Path, tmp_path: Path) -> None:
    own = keys / "clients" / "both"
    (tmp_path / "x.jsonl").touch()
    for server in ("localhost", "localhost:", ":9092", "localhost:99999"):
        with pytest.raises(ValueError, match="give HOST:PORT"):
            federate_client(ClientConfig(model="tiny", data=tmp_path / "x.jsonl", keys=own, server=server))
    with pytest.raises(ValueError, match=r"has no client\.key"):
        federate_client(ClientConfig(model="tiny", data=tmp_path / "x.jsonl", keys=tmp_path, server="localhost:1"))
    given: dict[str, Any] = {"model": "tiny", "data": "office", "out": tmp_path / "run"}
    with pytest.raises(ValueError, match=r"has no ca\.crt"):
        federate_server(ServerConfig(**given, keys=tmp_path, clients=3, clients_per_round=3))
    with pytest.raises(ValueError, match="--clients 9, but there are keys of 3"):
        federate_server(ServerConfig(**given, keys=keys / "server", clients=9, clients_per_round=3))
