"""What is refused before any training: clients that do not belong. Reads no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from smartmops.checks.errors import ClientsRefused, FederationError
from smartmops.settings.writing import versions

from .messages import VERSION, Failure, Hello, unpack
from .roster import short

DECIDING = ("torch", "transformers", "peft", "smartmops")  # packages whose versions decide the numbers


def admitted(found: Mapping[int, bytes], config: Any, base: str, experts: Sequence[str]) -> dict[int, Hello]:
    """The clients that may be asked, by number.

    Args:
        found: A packed `Hello` of each.
        config: A `FederateConfig`.
        base: Fingerprint of the server's base and tokenizer.
        experts: Tasks that the gate was pretrained for; empty without a gate.

    Raises:
        FederationError: there are too few.
        ClientsRefused: some sent no greeting, have no examples, another base, other versions, or tasks that the gate
            was not pretrained for.
    """
    if len(found) < config.clients_per_round:
        raise FederationError(f"clients_per_round={config.clients_per_round}, but there are {len(found)} clients: "
                              f"choose 1 to {len(found)}")  # fmt: skip
    members, refused = dict[int, Hello](), dict[int, str]()
    for client, blob in sorted(found.items()):
        try:
            hello = greeting(blob, f"client number {client}")
            _fits(hello, config, base, experts)
            members[client] = hello
        except FederationError as error:
            refused[client] = str(error)
    if refused:
        raise ClientsRefused.of(refused)
    return members


def _fits(hello: Hello, config: Any, base: str, experts: Sequence[str]) -> None:
    """Raises a `FederationError` where a client does not belong."""
    if hello.examples < 1:
        raise FederationError(f"client {hello.name!r} holds no examples: give it some, or leave it out")
    if hello.base != base:
        raise FederationError(f"client {hello.name!r} has another base model, tokenizer or template (fingerprint "
                              f"{short(hello.base)}, the server's {base}): load the same on both sides")  # fmt: skip
    _check_versions(hello, config.allow_other_versions)
    unknown = [task for task in hello.categories if task not in experts]
    if experts and config.gate_pretraining == "labels" and unknown:
        raise FederationError(f"client {hello.name!r} holds category {unknown[0]!r}, which the gate does not know "
                              f"(it knows {', '.join(experts)}): name an expert for it with --expert-names, or "
                              "choose --gate-pretraining clusters")  # fmt: skip


def greeting(blob: bytes, who: str) -> Hello:
    """The `Hello` in a blob that `who` sent.

    Raises:
        FederationError: it is none; the message names who sent it.
    """
    try:
        hello = unpack(blob)
    except ValueError as error:
        raise FederationError(f"{who} cannot take part: it sent {error}") from error
    if isinstance(hello, Failure):
        raise FederationError(f"{who} cannot take part: {short(hello.reason)}")
    if not isinstance(hello, Hello) or not _typed(hello):
        raise FederationError(
            f"{who} cannot take part: it sent no greeting of this version, but a {type(hello).__name__}"
        )
    return hello


def _typed(hello: Hello) -> bool:
    """Whether the words are what they should be: JSON may hold anything."""
    texts = [hello.name, hello.base, *(hello.categories if isinstance(hello.categories, list) else [None])]
    return (
        all(isinstance(each, str) for each in texts)
        and isinstance(hello.examples, int)
        and isinstance(hello.versions, dict)
    )


def _check_versions(hello: Hello, allow: bool) -> None:
    here = versions() | {"messages": str(VERSION)}
    for name in ("messages", *DECIDING):
        theirs = hello.versions.get(name)
        if theirs != here[name] and (name == "messages" or not allow):
            way_out = "" if name == "messages" else ", or accept it with --allow-other-versions"
            raise FederationError(
                f"client {hello.name!r} runs {name} {short(str(theirs))}, the server {here[name]}: install the same"
                + way_out
            )
