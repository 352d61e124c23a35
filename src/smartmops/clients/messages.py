"""What server and clients say to each other: arrays and a few words of JSON, as one safetensors blob.

Knows bytes. Knows no model, no data and no network: every transport carries these blobs as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from smartmops.adapter import typed
from smartmops.checks.errors import FederationError

from .roster import short

VERSION = 4  # of these messages; both sides must speak the same


@dataclass(frozen=True)
class Local:
    """How a client trains for one round. The same for all clients but for the seed."""

    steps: int  # optimiser steps
    batch_size: int  # examples
    prompt_lr: float  # Adam's rate for prompts (and for LoRA)
    gate_lr: float  # Adam's rate for the gate
    seed: int  # order of the client's examples
    proximal: float = 0.0  # FedProx's mu: mu / 2 * ||w - w_received||^2 is added to the loss
    max_grad_norm: float = 1.0  # gradients are clipped to it, as Hugging Face's Trainer does
    half: bool = False  # float16 on the way back, as the difference from what was received
    share_above: float = 0.0  # experts whose mean gate weight is not above it stay at home
    head_lr: float = 0.02  # Adam's rate for the weights per head of separate prefix attention


@dataclass(frozen=True)
class Job:
    """Server to client: train this adapter on what you hold."""

    round: int  # from 1
    client: int  # number of the client, from 0
    local: Local
    adapter: dict[str, Any]  # PEFT's config of the adapter
    base: str  # fingerprint of the frozen base and its tokenizer
    arrays: dict[str, Tensor] = field(repr=False)  # every tensor of the adapter, trained ones and constants


@dataclass(frozen=True)
class Reply:
    """Client to server: what training made of the trained arrays."""

    round: int
    client: int
    examples: int  # that the client holds
    loss: float  # nats per response token, mean over the local steps
    seconds: float  # of local training
    mass: list[float] | None  # mean gate weight of each expert over the client's examples; None without a gate
    experts: list[int] | None  # which experts' prompts are in `arrays`, in this order; None: all
    difference: bool  # whether `arrays` are differences from what was received, or values
    arrays: dict[str, Tensor] = field(repr=False)
    data: str = ""  # as in `Hello`: a client may come back with other data than it greeted with


@dataclass(frozen=True)
class Failure:
    """Client to server: no update, and why."""

    round: int
    client: int
    reason: str


@dataclass(frozen=True)
class Hello:
    """Client to server, before any training: who is there."""

    name: str  # the server numbers clients from 0 in the order of their names
    examples: int
    categories: list[str]
    base: str  # fingerprint of the frozen base and its tokenizer
    versions: dict[str, str]  # of the packages that decide the numbers, and `messages`
    data: str = ""  # tells whether the client holds what it held before, and nothing else, under a secret of its own


@dataclass(frozen=True)
class Refusal:
    """Server to client: it cannot take part, and why."""

    reason: str


@dataclass(frozen=True)
class Lost:
    """Transport to server, never sent: nothing of a client's own came back, and what is known of it."""

    reason: str


Message = Job | Reply | Failure | Hello | Refusal
KINDS: dict[str, type[Message]] = {kind.__name__: kind for kind in (Job, Reply, Failure, Hello, Refusal)}


@runtime_checkable
class Transport(Protocol):
    """How blobs reach clients: calls in this process, Flower's simulation, or Flower's network."""

    def hello(self) -> dict[int, bytes]:
        """A packed `Hello` (or `Failure`) of every client, by number."""
        ...

    def exchange(self, jobs: Mapping[int, bytes], timeout: float | None) -> Iterable[tuple[int, bytes | Lost]]:
        """Hand each client its packed `Job`; yields client and packed `Reply` or `Failure` as they come in, or `Lost`.

        Who has not answered after `timeout` seconds is missing from what comes back. Nothing is sorted, and a client
        may answer twice: the server sees to both.
        """
        ...

    def heard(self, clients: Iterable[int]) -> set[int]:
        """Those of `clients` that have answered a call since this was last asked; waits for nobody.

        The others are called, so that they are heard the next time if they are there.
        """
        ...

    def refuse(self, reasons: Mapping[int, str]) -> None:
        """Tell clients why they cannot take part, where somebody is there to be told."""
        ...

    def close(self) -> None:
        """Let go of processes and connections."""
        ...


class Made(Mapping[int, bytes]):
    """Blobs by number, each made when it is asked for and then forgotten: there may be as many as there are clients.

    Args:
        numbers: Of all blobs.
        make: One of them.
    """

    def __init__(self, numbers: Iterable[int], make: Callable[[int], bytes]) -> None:
        self._numbers, self._make = dict.fromkeys(numbers), make
        self._sizes: dict[int, int] = {}

    def __getitem__(self, number: int) -> bytes:
        if number not in self._numbers:
            raise KeyError(number)
        blob = self._make(number)
        self._sizes[number] = len(blob)
        return blob

    def __contains__(self, number: object) -> bool:
        return number in self._numbers

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def size(self) -> int:
        """Bytes of those that were made."""
        return sum(self._sizes.values())


def pack(message: Message) -> bytes:
    """One blob: tensors as they are, all else as JSON in the header."""
    words = {f.name: getattr(message, f.name) for f in fields(message) if f.name != "arrays"}
    if isinstance(message, Job):
        words["local"] = asdict(message.local)
    header = {"kind": type(message).__name__, "version": VERSION, "words": words}
    arrays: dict[str, Tensor] = getattr(message, "arrays", {})
    tensors = {name: value.detach().cpu().contiguous() for name, value in arrays.items()}
    blob: bytes = save(tensors or {"": torch.zeros(0)}, {"message": json.dumps(header, sort_keys=True)})
    return blob


def _of(kind: type[Any], words: Mapping[str, Any]) -> Any:
    """Fields by name.

    Raises:
        TypeError: one is unknown, missing, or not of its type.
    """
    if (said := typed.wrong(words, kind)) is not None:
        raise TypeError(said)
    return kind(**words)


def unpack(blob: bytes) -> Message:
    """The message in a blob.

    Raises:
        FederationError: it is damaged, of another version, or no message at all.
    """
    try:
        size = int.from_bytes(blob[:8], "little")
        header = json.loads(json.loads(blob[8 : 8 + size])["__metadata__"]["message"])
        arrays = {name: value for name, value in load(blob).items() if name}
        kind, words = header["kind"], dict(header["words"])
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = short(f"{type(error).__name__}: {error}")
        raise FederationError(f"a message of {len(blob)} bytes is damaged ({why})") from error
    if (version := header.get("version")) != VERSION:
        raise FederationError(f"a message of version {short(str(version))}, but this side speaks version {VERSION}: "
                              "install the same smartmops on server and clients")  # fmt: skip
    if not isinstance(kind, str) or kind not in KINDS:
        raise FederationError(f"a message of kind {short(repr(kind))}: choose {', '.join(KINDS)}")
    try:
        if kind == "Job":
            words["local"] = _of(Local, words["local"])
        if kind in ("Job", "Reply"):
            words["arrays"] = arrays
        made: Message = _of(KINDS[kind], words)
        return made
    except (TypeError, KeyError, RecursionError) as error:
        why = short(str(error))
        raise FederationError(f"a {kind} does not have the fields of version {VERSION} ({why})") from error
