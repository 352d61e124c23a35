"""`smartmops federate-client`: one model, loaded once, that answers the server's jobs on data that stay here.

Flower's SuperNode runs beside it and starts a short process for every message; that process reaches the model through
a socket that only this user can open, and both end together.
"""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass, fields
from http.client import HTTPException, HTTPSConnection
from json import JSONDecodeError, loads
from pathlib import Path

from smartmops.base import load_base
from smartmops.checks.errors import FederationError, MissingExtra
from smartmops.checks.limits import check
from smartmops.clients.holdings import client_task
from smartmops.clients.messages import Refusal, Reply, unpack
from smartmops.clients.roster import short
from smartmops.data.tasks import read_jsonl
from smartmops.federated.client import Worker
from smartmops.flower.frames import receive, send
from smartmops.flower.simulation import QUIET
from smartmops.options.federation import ClientConfig
from smartmops.options.training import TaskConfig
from smartmops.progress.bars import console
from smartmops.states.fingerprint import of_base
from smartmops.tokens.template import Template

from .guard import guarded
from .keys import signed_now
from .knocks import KNOCK

ATTEMPTS, PAUSE, LASTING = 4, 5.0, 60.0  # of starting the SuperNode; seconds between; seconds after which it counts
ASKING = 5.0  # seconds between looks whether the server is there and will have this client
ANSWERING = 10.0  # seconds that the server may take to say who it knows
POLLING = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}  # seconds; every message waits for it on either side
READ = b"read"  # what answers a refusal
Answer = Callable[[str, bytes], bytes]  # kind and blob in, blob out


def federate_client(config: ClientConfig) -> int:
    """Load model and data, then answer one server after another until Ctrl+C, or none is there for `max_wait` s.

    Returns an exit status.

    Raises:
        FederationError: the address, the keys or the data are wrong.
        MissingExtra: Flower is not installed.
    """
    _check(config)
    if (welcome := knock(config)).final:  # before a model is loaded for nothing
        console.print(welcome.said)
        return 1
    worker, refusals = worker_of_file(config), Refusals(config.server)
    with tempfile.TemporaryDirectory(prefix="smartmops-") as folder:  # made with mode 0700
        path = f"{folder}/worker"
        with serving(path, lambda kind, blob: refusals.read(kind, blob) or _said(worker, kind, blob)):
            return _lasting(config, path, refusals.came)


def _check(config: ClientConfig) -> None:
    from importlib.util import find_spec

    if not find_spec("flwr"):
        raise MissingExtra("a real federation needs Flower: pip install 'smartmops[federated]'")
    check(config)


def worker_of_file(config: ClientConfig) -> Worker:
    """The frozen base and the rows of one file."""
    known = {f.name for f in fields(TaskConfig)}
    given = {f.name: getattr(config, f.name) for f in fields(config) if f.name in known}
    examples = read_jsonl(config.data, config.columns)
    base, tokenizer = load_base(config.model, config.dtype)
    fingerprint = of_base(base, tokenizer, Template.of(config.template, tokenizer))
    task = client_task(TaskConfig(**given | {"data": str(config.data)}), base, tokenizer, examples)
    names, secret = [config.name or config.data.stem], (config.keys / "client.key").read_bytes()
    return Worker(task, [range(len(task.train))], names, fingerprint, secret=secret)


def _said(worker: Worker, kind: str, blob: bytes) -> bytes:
    if kind == "query":
        console.print(f"the server asks who is here: {worker.names[0]}, {len(worker.holdings[0])} examples")
        return worker.hello(0)
    answer = worker.answer(blob, client=0)
    if isinstance(reply := unpack(answer), Reply):
        console.print(f"round {reply.round}: loss {reply.loss:.3f} nats a token, {reply.seconds:.1f} s of training, "
                      f"{len(answer):,} bytes sent")  # fmt: skip
    else:
        console.print(f"a job failed: {getattr(reply, 'reason', reply)}")
    return answer


@contextmanager
def serving(path: str, answer: Answer) -> Iterator[None]:
    """Answers frames at a UNIX socket, one after another, in a thread of its own."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen()

    def run() -> None:
        while True:
            try:
                line, _ = listener.accept()
            except OSError:  # closed
                return
            with line, suppress(ConnectionError):  # who asked was killed: the next one may ask
                words, (blob,) = receive(line)
                send(line, {}, [answer(words["kind"], blob)])

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


class Refusals:
    """What the server at an address says against this client in place of asking it anything."""

    def __init__(self, server: str) -> None:
        self.server, self.came = server, threading.Event()

    def read(self, kind: str, blob: bytes) -> bytes:
        """Tell the operator of a refusal, and what answers it; nothing where it is none.

        Words of another version are one: they come with a call only from a server that will not have this client.
        """
        if kind != "query" or not blob:
            return b""
        try:
            found = unpack(blob)
        except FederationError as error:
            found = Refusal(str(error))
        if not isinstance(found, Refusal):
            return b""
        console.print(f"the server at {self.server} refuses this client: {short(found.reason)}")
        self.came.set()
        return READ


def _lasting(config: ClientConfig, path: str, refused: threading.Event) -> int:
    """An exit status once Flower's SuperNode has ended for good, or the server says why it will not have this client.

    Flower's own, but never 0, for nobody asked it to end.
    """
    server, left, status, told = Presence(config.server), ATTEMPTS, 0, ""
    while left:
        welcome = knock(config)
        if welcome.said and welcome.said != told:
            console.print(told := welcome.said)
        if welcome.final:
            return 1
        if welcome.wait:
            time.sleep(PAUSE)
            continue
        started = time.monotonic()
        with supernode(config, path) as node:
            ended = _watched(node, server, config.max_wait, refused)
        if refused.is_set():
            return 1
        if ended is None:
            console.print(f"nobody has listened at {config.server} for {config.max_wait:g} s: this client ends")
            return 1
        # A new server sends nodes of the last one away; one that has just come up may not be ready for this one yet.
        status, left = ended, ATTEMPTS if time.monotonic() - started > LASTING else left - 1
        time.sleep(PAUSE if left else 0)
    return status or 1


# --------------------------------------------------------------------------------------------------- the server
@dataclass(frozen=True)
class Welcome:
    """What the server says of this client.

    Attributes:
        said: For the operator; empty where there is nothing to say.
        final: The server will not have this client.
        wait: It may later on.
    """

    said: str = ""
    final: bool = False
    wait: bool = False


def address_of(server: str) -> tuple[str, int]:
    """Host and port."""
    host, _, port = server.rpartition(":")
    return host.strip("[]"), int(port)


def knock(config: ClientConfig) -> Welcome:
    """Ask the server whether it is ours and knows us, which Flower's own node tells nobody.

    Nobody there is no answer: that node waits for a server by itself.

    Raises:
        FederationError: `client.key` holds no client's key.
    """
    host, port = address_of(config.server)
    try:
        context = ssl.create_default_context(cafile=str(config.keys / "ca.crt"))
    except ssl.SSLError as error:
        return Welcome(f"{config.keys / 'ca.crt'} holds no certificate ({error.reason}): copy it again", final=True)
    try:
        with closing(HTTPSConnection(host, port, timeout=ANSWERING, context=context)) as line:
            line.request("POST", KNOCK, headers=signed_now(config.keys / "client.key") | {"Content-Length": "0"})
            found = line.getresponse()
            return _meant(config, found.status, found.read(1 << 16).decode("utf-8", "replace"))
    except ssl.SSLCertVerificationError as error:
        return Welcome(_untrusted(config, host, error), final=True)
    except (OSError, HTTPException):
        return Welcome()


def _untrusted(config: ClientConfig, host: str, error: ssl.SSLCertVerificationError) -> str:
    mismatch = "mismatch" in error.verify_message or "not valid for" in error.verify_message
    if mismatch:
        return (f"the certificate of the server at {config.server} is not for {host} ({error.verify_message}): name "
                f"{host} among --hosts of `smartmops federate-keys` and copy its folder `server` anew")  # fmt: skip
    return (f"the server at {config.server} is not the one that {config.keys / 'ca.crt'} vouches for "
            f"({error.verify_message}): check --server, or copy the ca.crt that is beside its keys")  # fmt: skip


def _meant(config: ClientConfig, status: int, text: str) -> Welcome:
    if status == 401:
        return Welcome(f"the server at {config.server} refuses {config.keys / 'client.key'} ({text.strip()}): ask its "
                      "operator whether the key is still in its folder `clients`", final=True)  # fmt: skip
    try:
        known = loads(text) if status == 200 else {}
        name, there = known.get("name", ""), known.get("there")
    except (JSONDecodeError, AttributeError):
        return Welcome()  # none of ours: Flower's node will say what it is
    if not there:
        return Welcome(f"the server at {config.server} knows this key as {name!r}" if name else "")
    return Welcome(f"the server at {config.server} still hears a client with this key ({name!r}): another one runs "
                   "with it, or was just killed; waiting until it is gone. Each client needs a key of its own: "
                   "`smartmops federate-keys --clients NAME`", wait=True)  # fmt: skip


class Presence:
    """Whether somebody listens at an address, and when somebody last did."""

    def __init__(self, server: str) -> None:
        self.address, self.seen = address_of(server), time.monotonic()

    def missing(self) -> float:
        """Seconds since somebody listened there, as far as we asked."""
        with suppress(OSError), socket.create_connection(self.address, 1):
            self.seen = time.monotonic()
        return time.monotonic() - self.seen


def _watched(
    node: subprocess.Popen[bytes], server: Presence, max_wait: float | None, refused: threading.Event
) -> int | None:
    """The node's exit status; None once it is of no use: the server is gone for `max_wait`, or refuses this client."""
    while True:
        try:
            return node.wait(ASKING)
        except subprocess.TimeoutExpired:
            if refused.is_set():
                with suppress(subprocess.TimeoutExpired):
                    node.wait(ASKING)  # that the refusal was read is still on its way to the server
                return None
            if max_wait is not None and server.missing() > max_wait:  # Flower's own would hang
                return None


def supernode(config: ClientConfig, path: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """Flower's side of a client whose worker listens at `path`; it and its own end with the block, and this process."""
    command = [
        beside("flower-supernode"), "--superlink", config.server, "--root-certificates", str(config.keys / "ca.crt"),
        "--auth-supernode-private-key", str(config.keys / "client.key"), "--node-config", f'socket="{path}"',
        "--port", str(free_port()),
    ]  # fmt: skip
    return guarded(command, env=surroundings(Path(path).parent / "flower"))


def surroundings(home: Path) -> dict[str, str]:
    """The environment of Flower's programs: they keep what they know in `home`, and look for one another on PATH."""
    own = str(Path(sys.executable).parent)  # on nobody's PATH where the virtual environment is not activated
    path = os.pathsep.join([own, os.environ.get("PATH", os.defpath)])
    return POLLING | os.environ | QUIET | {"FLWR_HOME": str(home.resolve()), "PATH": path}


def beside(program: str) -> str:
    """A program of the environment that runs this one."""
    return str(Path(sys.executable).with_name(program))


def free_port() -> int:
    """A port of loopback that nobody has right now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
