"""The same routes under Ray Serve, as several replicas that each load the run. Knows Ray; knows no tokens.

    python -m smartmops.web.replicas RUN [--port 8000] [--replicas 2] [--api-key-file FILE]

Ray's proxy listens and shares requests out. Limits on a connection are the proxy's own.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from smartmops.checks.errors import MissingExtra
from smartmops.options.finished.serving import ServeConfig, keys_in
from smartmops.serving.answering import Answerer
from smartmops.serving.batching import Batcher

from .bodies import Limits
from .server import Site, make_app

MINUTES = 10  # that a proxy may take to start


def routes(config: ServeConfig) -> FastAPI:
    """The routes over a run that is loaded here; a replica calls it where it starts."""
    answerer = Answerer.open(config.run)
    keys = [] if config.api_key_file is None else keys_in(config.api_key_file)
    batcher = Batcher(answerer, config.batch_size, config.queue).start()
    return make_app(Site(answerer, batcher, config.max_tokens, keys, Limits(answer=config.request_timeout)))


def application(config: ServeConfig, replicas: int, cpus: float = 1.0) -> Any:
    """What `ray.serve.run` deploys.

    Args:
        config: The run and the limits of each replica; Ray knows the address.
        replicas: How many of them there are.
        cpus: Cores that Ray sets aside for each.

    Raises:
        MissingExtra: Ray Serve is not installed.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise MissingExtra('replicas need Ray Serve: pip install "smartmops[ray]"') from error
    ingress = serve.ingress(lambda: routes(config))()  # Ray calls plain functions alone in its replicas
    waiting = config.queue + config.batch_size
    deployed = serve.deployment(ingress, name="smartmops", num_replicas=replicas, max_ongoing_requests=waiting,
                                ray_actor_options={"num_cpus": cpus})  # fmt: skip
    return deployed.bind()


def start(deployed: Any, host: str, port: int) -> None:
    """Start Ray's proxy and all replicas of what `application` gave, none of them behind other work of the machine.

    Raises:
        TimeoutError: Ray's proxy was not there after `MINUTES`.
    """
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 unless set
    from ray import serve

    _patiently(lambda: serve.start(http_options={"host": host, "port": port}))
    _patiently(lambda: serve.run(deployed, route_prefix="/"))


def _patiently(call: Callable[[], Any]) -> None:
    """Call again what Ray gives up after a minute: what it has begun goes on, and a busy machine needs longer."""
    for left in reversed(range(MINUTES)):
        try:
            call()
            return
        except TimeoutError:
            if not left:
                raise


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m smartmops.web.replicas", description="replicas under Ray Serve")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on")
    parser.add_argument("--replicas", type=int, default=2, help="how many load the run")
    parser.add_argument("--api-key-file", type=Path, help="file with one key a line")
    given = parser.parse_args()
    config = ServeConfig(run=given.run.resolve(), host=given.host, port=given.port,
                         api_key_file=given.api_key_file and given.api_key_file.resolve())  # fmt: skip
    deployed = application(config, given.replicas)
    from ray import serve

    start(deployed, given.host, given.port)
    print(f"http://{given.host}:{given.port}/v1 serves {given.replicas} replicas", flush=True)
    try:
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
    finally:
        serve.shutdown()


if __name__ == "__main__":
    main()
