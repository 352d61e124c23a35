"""Flower's simulation: virtual clients in processes of Ray, each process with one frozen model for all that come by.

Knows Ray and Flower's in-memory nodes. The round loop and the client are those of every other engine.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from smartmops.checks.errors import MissingExtra, OutOfMemory
from smartmops.checks.limits import check
from smartmops.checks.resources import lower
from smartmops.clients.messages import Transport
from smartmops.clients.partition import read_clients
from smartmops.data.tasks import splits
from smartmops.federated.client import Worker
from smartmops.federated.federate import federate, worker_of
from smartmops.options.federation import FederateConfig

from .transport import OverFlower

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # 15 unless set: beside any other work actors would hardly run at all
}  # fmt: skip
AT_ONCE = 64  # messages that Flower and Ray hold: more than there are actors, fewer than there may be clients
PATIENCE = 3600.0  # seconds that virtual nodes are waited for: none goes away, but a busy machine is slow

_workers: dict[str, Worker] = {}  # of this process, by config: an actor answers many clients with one model


class GridNodes:
    """Flower's nodes, asked from within its ServerApp."""

    def __init__(self, grid: Any) -> None:
        self.grid = grid
        self.calls: dict[str, int] = {}

    def there(self) -> dict[int, str]:
        """All nodes that are there now; they have no keys, whose names could follow."""
        return dict.fromkeys(self.grid.get_node_ids(), "")

    def heard(self, nodes: Sequence[int]) -> list[int]:
        """Those that have answered a call since this was last asked; the others are called."""
        from .app import heard

        return heard(self.grid, nodes, self.calls)

    def ask(self, kind: str, blobs: Mapping[int, bytes], timeout: float | None) -> Iterator[tuple[int, bytes, str]]:
        """Node, answer, and what went wrong, as they come in."""
        from .app import ask

        yield from ask(self.grid, kind, blobs, timeout, AT_ONCE)


def simulate(config: FederateConfig) -> dict[str, Any]:
    """`federate(config)` with Flower's simulation as the engine; the same arrays, and the same run folder.

    Raises:
        MissingExtra: Flower is not installed.
        FederationError: as `federate`.
        OutOfMemory: Ray ended actors, since the memory of the machine was nearly full.
    """
    check(config)
    os.environ |= QUIET
    try:
        from flwr.clientapp import ClientApp
        from flwr.serverapp import ServerApp
        from flwr.simulation import run_simulation
    except ImportError as error:
        raise MissingExtra(f"engine={config.engine!r} needs Flower ({error.name} is missing): "
                           "pip install 'smartmops[federated]'") from error  # fmt: skip
    clients, found = clients_of(config), dict[str, Any]()
    server, client = ServerApp(), ClientApp()
    threads = max(1, torch.get_num_threads() // config.actors)
    client.query()(partial(_answer, config, threads, "query"))
    client.train()(partial(_answer, config, threads, "train"))

    def connect(config: FederateConfig) -> Transport:
        return OverFlower(GridNodes(found["grid"]), clients, PATIENCE)

    @server.main()
    def main(grid: Any, context: Any) -> None:
        found["grid"] = grid
        try:
            found["metrics"] = federate(config, connect)
        except BaseException as error:
            found["error"] = error  # Flower would wrap it

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        run_simulation(
            server, client, clients,
            backend_config={"init_args": {"num_cpus": config.actors, "include_dashboard": False},
                            "client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
        )  # fmt: skip
    if failed := found.get("error"):
        if "ray.exceptions.OutOfMemoryError" in str(failed):  # Ray ends actors where memory is nearly full
            raise OutOfMemory(lower(config, failed)) from failed
        raise failed
    metrics: dict[str, Any] = found["metrics"]
    return metrics


def clients_of(config: FederateConfig) -> int:
    """How many clients a config names, those without examples included."""
    if config.clients_data is not None:
        return len({example.source for example in read_clients(config.clients_data, config.columns)})
    if config.partition != "source":
        return config.clients
    seed = config.seed if config.data_seed is None else config.data_seed
    train, _ = splits(config.data, config.limit, config.test_share, seed, columns=config.columns)
    return len({example.source for example in train})


def _answer(config: FederateConfig, threads: int, kind: str, message: Any, context: Any) -> Any:
    """In an actor: what the client of this node says."""
    from flwr.app import ConfigRecord, Message, RecordDict

    torch.set_num_threads(threads)
    key = repr(config)
    if key not in _workers:
        _workers[key] = worker_of(config)
    worker, number = _workers[key], int(context.node_config["partition-id"])
    if kind == "train":
        blob = worker.answer(bytes(message.content["blob"]["blob"]))
    else:  # nodes beyond the clients that hold examples say nothing
        blob = worker.hello(number) if number < len(worker.names) else b""
    return Message(RecordDict({"blob": ConfigRecord({"blob": blob})}), reply_to=message)
