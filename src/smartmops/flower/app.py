"""What Flower runs on either side: relays between its messages and the process that holds the model.

Flower starts a fresh process for every message, so nothing heavy may be imported here: the model stays in the process
that listens at `socket`. This file and `frames.py` are all that the app bundle holds, and import Flower alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from .frames import connect, receive, send

server = ServerApp()  # two statements: Flower looks for each by its own
client = ClientApp()


def ask(
    grid: Grid, kind: str, blobs: Mapping[int, bytes], timeout: float | None, at_once: int | None = None
) -> Iterator[tuple[int, bytes, str]]:
    """Node, answer, and what went wrong ("" if nothing), as they come in; the silent are missing.

    With `at_once`, Flower never holds more messages than that: the next goes out as an answer comes in.
    """
    asked: dict[str, int] = {}
    waiting, more, end = iter(blobs.items()), True, 0.0
    while True:
        while more and (at_once is None or len(asked) < at_once):
            if (more := (pair := next(waiting, None)) is not None) and pair is not None:
                if handed := _push(grid, kind, *pair):
                    asked[handed] = pair[0]
                else:
                    yield pair[0], b"", "Flower did not take the message for it"
        end = end or time.monotonic() + (timeout or 0)
        if not asked or (timeout is not None and time.monotonic() >= end):
            return
        yield from _pull(grid, asked)
        time.sleep(0.05)


def heard(grid: Grid, nodes: Sequence[int], calls: dict[str, int]) -> list[int]:
    """Those of `nodes` that have answered a call since this was last asked; the others are called, not waited for.

    `calls` are those without an answer so far: whoever asks keeps them from one time to the next.
    """
    found = {node for node, _, wrong in _pull(grid, calls) if not wrong} if calls else set()
    for node in nodes:
        if node not in found and node not in calls.values() and (handed := _push(grid, "query", node, b"")):
            calls[handed] = node
    return [node for node in nodes if node in found]


def _push(grid: Grid, kind: str, node: int, blob: bytes) -> str | None:
    """The number of the message, which is pushed alone: what Flower says of a dead node does not name the node."""
    message = Message(RecordDict({"blob": ConfigRecord({"blob": blob})}), node, kind)
    return next(iter(grid.push_messages([message])), None)


def _pull(grid: Grid, asked: dict[str, int]) -> Iterator[tuple[int, bytes, str]]:
    """What has come in of `asked`, which it is then taken out of."""
    for reply in grid.pull_messages(list(asked)):
        if (known := asked.pop(reply.metadata.reply_to_message_id, None)) is None:
            continue
        if reply.has_error():
            yield known, b"", f"Flower: {reply.error.reason}"
        else:
            yield known, bytes(reply.content["blob"]["blob"]), ""


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """Do what the federating process says until it closes the connection."""
    calls: dict[str, int] = {}
    with connect(str(context.run_config["socket"])) as line:
        while True:
            try:
                words, blobs = receive(line)
            except ConnectionError:
                return
            if words["do"] == "nodes":
                send(line, {"nodes": {str(node.node_id): node.name for node in grid.get_nodes()}})
                continue
            if words["do"] == "heard":
                found = heard(grid, [int(node) for node in words["nodes"]], calls)
                send(line, {"nodes": [str(node) for node in found]})
                continue
            asked = dict(zip((int(node) for node in words["nodes"]), blobs, strict=True))
            for node, blob, wrong in ask(grid, words["kind"], asked, words["timeout"]):
                send(line, {"node": str(node), "wrong": wrong}, [blob])
            send(line, {"done": True})


def _forward(message: Message, context: Context, kind: str) -> Message:
    blob: Any = message.content["blob"]["blob"] if "blob" in message.content else b""
    with connect(str(context.node_config["socket"])) as line:
        send(line, {"kind": kind}, [bytes(blob)])
        _, (answer,) = receive(line)
    return Message(RecordDict({"blob": ConfigRecord({"blob": answer})}), reply_to=message)


@client.query()
def hello(message: Message, context: Context) -> Message:
    """Who is there."""
    return _forward(message, context, "query")


@client.train()
def train(message: Message, context: Context) -> Message:
    """A round of local training."""
    return _forward(message, context, "train")
