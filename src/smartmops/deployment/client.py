"""`smartmops federate-client`: one model, loaded once, that answers the server's jobs on data that stay here.

Flower's SuperNode runs beside it and starts a short process for every message; that process reaches the model through
a socket that only this user can open, and both end together.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from smartmops.base import load_base
from smartmops.data.tasks import read_jsonl
from smartmops.data.template import Template
from smartmops.federated.client import Worker
from smartmops.federated.federate import client_task
from smartmops.federated.messages import Job, Reply, unpack
from smartmops.flower.frames import receive, send
from smartmops.flower.simulation import QUIET
from smartmops.options.federation import ClientConfig
from smartmops.options.limits import check
from smartmops.options.training import TaskConfig
from smartmops.training.fingerprint import of_base

console = Console()

ATTEMPTS, PAUSE, LASTING = 4, 5.0, 60.0  # of starting the SuperNode; seconds between; seconds after which it counts
ASKING = 5.0  # seconds between looks whether the server is there
POLLING = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}  # seconds; every message waits for it on either side
Answer = Callable[[str, bytes], bytes]  # kind and blob in, blob out


def federate_client(config: ClientConfig) -> int:
    """Load model and data, then answer one server after another until Ctrl+C, or none is there for `max_wait` s.

    Returns an exit status.

    Raises:
        ValueError: the address, the keys or the data are wrong.
        ImportError: Flower is not installed.
    """
    _check(config)
    worker = worker_of_file(config)
    with tempfile.TemporaryDirectory(prefix="smartmops-") as folder:  # made with mode 0700
        path = f"{folder}/worker"
        with serving(path, lambda kind, blob: _said(worker, kind, blob)):
            return _lasting(config, path)


def _check(config: ClientConfig) -> None:
    from importlib.util import find_spec

    if not find_spec("flwr"):
        raise ImportError("a real federation needs Flower: pip install 'smartmops[federated]'")
    check(config)


def worker_of_file(config: ClientConfig) -> Worker:
    """The frozen base and the rows of one file."""
    known = {f.name for f in fields(TaskConfig)}
    given = {f.name: getattr(config, f.name) for f in fields(config) if f.name in known}
    examples = read_jsonl(config.data)
    base, tokenizer = load_base(config.model, config.dtype)
    fingerprint = of_base(base, tokenizer, Template.of(config.template, tokenizer))
    task = client_task(TaskConfig(**given | {"data": str(config.data)}), base, tokenizer, examples)
    return Worker(task, [range(len(task.train))], [config.name or config.data.stem], fingerprint)


def _said(worker: Worker, kind: str, blob: bytes) -> bytes:
    if kind == "query":
        console.print(f"the server asks who is here: {worker.names[0]}, {len(worker.holdings[0])} examples")
        return worker.hello(0)
    answer = worker.answer(blob, client=0)
    job, reply = unpack(blob), unpack(answer)
    if isinstance(job, Job) and isinstance(reply, Reply):
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


def _lasting(config: ClientConfig, path: str) -> int:
    """Flower's exit status once its SuperNode has ended for good; never 0, for nobody asked it to."""
    server, left, status = Presence(config.server), ATTEMPTS, 0
    while left:
        started = time.monotonic()
        with forwarding(node := supernode(config, path)):
            ended = node.wait() if config.max_wait is None else _watched(node, server, config.max_wait)
        if ended is None:
            console.print(f"nobody has listened at {config.server} for {config.max_wait:g} s: this client ends")
            return 1
        # A new server sends nodes of the last one away; one that has just come up may not know this client's key yet.
        status, left = ended, ATTEMPTS if time.monotonic() - started > LASTING else left - 1
        time.sleep(PAUSE if left else 0)
    return status or 1


class Presence:
    """Whether somebody listens at an address, and when somebody last did."""

    def __init__(self, server: str) -> None:
        host, _, port = server.rpartition(":")
        self.address, self.seen = (host.strip("[]"), int(port)), time.monotonic()

    def missing(self) -> float:
        """Seconds since somebody listened there, as far as we asked."""
        with suppress(OSError), socket.create_connection(self.address, 1):
            self.seen = time.monotonic()
        return time.monotonic() - self.seen


def _watched(node: subprocess.Popen[bytes], server: Presence, max_wait: float) -> int | None:
    """The node's exit status; None once the server is gone for `max_wait`, after which Flower's own would hang."""
    while True:
        try:
            return node.wait(ASKING)
        except subprocess.TimeoutExpired:
            if server.missing() > max_wait:
                return None


def supernode(config: ClientConfig, path: str) -> subprocess.Popen[bytes]:
    """Flower's side of a client whose worker listens at `path`, started."""
    command = [
        beside("flower-supernode"), "--superlink", config.server, "--root-certificates", str(config.keys / "ca.crt"),
        "--auth-supernode-private-key", str(config.keys / "client.key"), "--node-config", f'socket="{path}"',
        "--port", str(free_port()),
    ]  # fmt: skip
    return subprocess.Popen(command, env=surroundings(Path(path).parent / "flower"))


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


@contextmanager
def forwarding(child: subprocess.Popen[bytes], seconds: float = 10.0) -> Iterator[None]:
    """The child ends when this process is told to, and has ended when the block is left."""
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)) if in_main else None
    try:
        yield
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)
        child.terminate()
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
