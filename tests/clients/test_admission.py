"""Who may take part in a federation, and what the others are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smartmops.checks.errors import ClientsRefused
from smartmops.clients.admission import admitted
from smartmops.clients.messages import VERSION, Failure, Hello, Reply, pack
from smartmops.federated import federate as module
from smartmops.federated.federate import FederateConfig, InProcess, federate
from smartmops.runs.folder import Run
from smartmops.settings.writing import versions

Make = Callable[..., FederateConfig]


def hello(**changes: Any) -> bytes:
    given = {
        "name": "x",
        "examples": 3,
        "categories": ["a"],
        "base": "own",
        "versions": versions() | {"messages": str(VERSION)},
    }
    return pack(Hello(**given | changes))


@pytest.mark.parametrize(
    ("blob", "said"),
    [
        (pack(Failure(0, 2, "no more memory")), "client number 2 cannot take part: no more memory"),
        (hello()[:-3], "client number 2 cannot take part: it sent a message of .* is damaged"),
        (pack(Reply(1, 2, 3, 1.0, 1.0, None, None, False, {})), "cannot take part: it sent no greeting .* but a Reply"),
        (hello(name="seven").replace(rb"\"seven\"", rb"[7    ]  "), "client number 2 cannot take part: it sent"),
    ],
)
def test_what_is_no_greeting_is_refused_with_who_sent_it(config: Make, blob: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        admitted({0: hello(name="ok"), 1: hello(name="fine"), 2: blob}, config(), "own", ["a", "b"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"examples": 0}, "'x' holds no examples"),
        ({"base": "other"}, "another base model, tokenizer or template"),
        ({"versions": versions() | {"messages": str(VERSION), "torch": "1.0"}}, r"runs torch 1\.0, the server .*--allow-other-versions"),
        ({"versions": versions() | {"messages": "7"}}, f"runs messages 7, the server {VERSION}: install the same$"),
        ({"categories": ["a", "zebra"]}, "'zebra', which the gate does not know .*--gate-pretraining clusters"),
    ],
)  # fmt: skip
def test_a_client_that_does_not_belong_is_refused(config: Make, change: dict[str, Any], said: str) -> None:
    everyone = {0: hello(name="ok"), 1: hello(name="fine"), 2: hello(**change)}
    with pytest.raises(ValueError, match=said):
        admitted(everyone, config(), "own", ["a", "b"])


def test_all_that_do_not_belong_are_told_why_before_the_run_ends(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[int, str] = {}
    found = {n: hello(name=f"c{n}", base="own" if n < 3 else "other") for n in range(8)}
    monkeypatch.setattr(InProcess, "hello", lambda self: found)
    monkeypatch.setattr(InProcess, "refuse", lambda self, reasons: told.update(reasons))
    monkeypatch.setattr(module, "of_base", lambda *given: "own")
    with pytest.raises(ClientsRefused, match=r"'c3' has another base(.*\n)*and 2 more clients cannot take part$"):
        federate(config())
    assert sorted(told) == [3, 4, 5, 6, 7] and all(f"'c{n}' has another base" in told[n] for n in told)


def test_clients_that_belong_are_numbered_and_named(config: Make) -> None:
    everyone = {n: hello(name=str(n), versions={"messages": str(VERSION)}) for n in range(3)}
    members = admitted(everyone, config(allow_other_versions=True), "own", ["a", "b"])
    assert {number: hello.name for number, hello in members.items()} == {0: "0", 1: "1", 2: "2"}
    with pytest.raises(ValueError, match="clients_per_round=3, but there are 2 clients"):
        admitted({n: everyone[n] for n in range(2)}, config(), "own", [])


def test_a_resumed_run_is_told_whose_data_are_others_and_that_the_clients_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.create(
        tmp_path / "run", {"command": "federate-server", "arguments": {}, "seed": 0, "base": "b", "data": "d"}
    )

    def told(**data: str) -> str:
        hellos = {n: Hello(name, 3, ["a"], "own", {}, data[name]) for n, name in enumerate(sorted(data))}
        module._tell_of_others(run, hellos.values())
        return " ".join(capsys.readouterr().out.split())

    assert told(berlin="1", paris="2") == told(berlin="1", paris="2") == ""
    said = told(berlin="3", paris="2")
    assert said.startswith("the data of client 'berlin' are not what they were") and "paris" not in said
    assert told(berlin="3", paris="2") == ""  # said once
    assert told(berlin="3", oslo="5").startswith("the clients are not those that")
    module._tell_of_data(run, {"berlin": "4", "paris": "2"})  # as a round's answers tell
    assert "the data of client 'berlin' are not what they were" in " ".join(capsys.readouterr().out.split())
