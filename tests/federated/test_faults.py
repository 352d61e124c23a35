"""Clients that die, lie, lag or answer twice: the round goes on without them, says so, and ends where it would have."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from faulty import FAULTS, Faulty, Straggling, silent
from smartmops import cli
from smartmops.federated import federate as module
from smartmops.federated.federate import FederateConfig, InProcess, federate
from smartmops.federated.rounds import QuorumLost
from smartmops.runs.folder import Run

Make = Callable[..., FederateConfig]
REASONS = {
    "killed": "no answer", "NaN": "finite", "infinity": "finite", "wrong shape": r"\[6, 31\]", "missing array": "missing",
    "missing expert": r"\[3, 32\]", "1,000 times too large": "norm", "answer to another round": "round",
    "damaged": "damaged", "answered twice": "twice", "oversized": "the limit is",
}  # fmt: skip


@pytest.fixture
def with_transport(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[InProcess], Any]], None]:
    """Puts something around the transport of the runs to come."""

    def use(wrap: Callable[[InProcess], Any]) -> None:
        monkeypatch.setattr(module, "InProcess", lambda worker: wrap(InProcess(worker)))

    return use


@pytest.mark.parametrize("name", FAULTS)
def test_one_bad_client_is_left_out_with_a_reason_and_the_round_goes_on(
    config: Make, with_transport: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with_transport(lambda inner: Faulty(inner, FAULTS[name], clients=[1]))
    settings = config(clients=4, clients_per_round=4, rounds=3)
    metrics = federate(settings)
    told = " ".join(capsys.readouterr().out.split())
    rounds = metrics["rounds"][1:]
    failures = [failure for row in curves(settings.out) for failure in row.get("failures", [])]
    assert failures and all((failure["client"], failure["name"]) == (1, "client 1") for failure in failures)
    assert [
        failure for row in rounds for failure in row["failures"]
    ] == failures and f"('client 1': {failures[0]['reason']}" in told
    assert all(re.search(REASONS[name], failure["reason"]) for failure in failures), failures
    good = 4 if name == "answered twice" else 3
    assert all(row["clients_ok"] == good for row in rounds)
    assert metrics["perplexity"]["overall"] < metrics["rounds"][0]["perplexity"]["overall"]
    assert all(
        torch.isfinite(v).all() for v in load_file(settings.out / "adapter" / "adapter_model.safetensors").values()
    )


def curves(out: Path) -> list[dict[str, Any]]:
    return Run.open(out).read_curves()


def test_a_second_answer_changes_nothing(config: Make, once: Callable[..., Path], with_transport: Any) -> None:
    clean = once()
    with_transport(lambda inner: Faulty(inner, FAULTS["answered twice"]))
    federate(config())
    files = [load_file(out / "adapter" / "adapter_model.safetensors") for out in (clean, config().out)]
    assert all(torch.equal(files[0][n], files[1][n]) for n in files[0])


def test_a_straggler_is_not_waited_for(config: Make, with_transport: Any) -> None:
    with_transport(lambda inner: Straggling(inner, [3], 1.5))
    settings = config(clients=4, clients_per_round=4, rounds=2, timeout=1.2)
    metrics = federate(settings)
    assert [row["clients_ok"] for row in metrics["rounds"][1:]] == [3, 3]
    assert all("within 1.2 s" in f["reason"] for row in curves(settings.out) for f in row.get("failures", []))


def test_a_round_below_the_quorum_is_repeated_with_other_clients(config: Make, with_transport: Any) -> None:
    with_transport(lambda inner: Faulty(inner, silent, probability=0.6, seed=1))
    metrics = federate(config(clients=5, clients_per_round=3, quorum=2, attempts=20, rounds=3))
    rounds = metrics["rounds"][1:]
    assert all(row["clients_ok"] >= 2 for row in rounds)
    assert any(row["clients_failed"] + row["clients_ok"] > 3 for row in rounds)  # some round was asked again


def test_too_few_clients_again_and_again_stop_the_run_which_then_resumes(
    config: Make, once: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config()
    calls: list[int] = []

    class Dying(Faulty):
        def exchange(self, jobs: Any, timeout: Any) -> Any:
            calls.append(1)
            return iter(()) if len(calls) > 1 else self.inner.exchange(jobs, timeout)

    with monkeypatch.context() as patch:
        patch.setattr(module, "InProcess", lambda worker: Dying(InProcess(worker), silent))
        with pytest.raises(
            QuorumLost, match=r"round 2: fewer than 2 of 3 clients .* in 3 attempts .*no answer.*--resume"
        ):
            federate(settings)
    assert len(calls) == 4
    federate(replace(settings, resume=True))
    files = [load_file(out / "adapter" / "adapter_model.safetensors") for out in (once(), settings.out)]
    assert all(torch.equal(files[0][n], files[1][n]) for n in files[0])


def test_the_command_ends_with_a_status_of_its_own_when_the_quorum_is_lost(
    config: Make, with_transport: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_transport(lambda inner: Faulty(inner, silent))
    c = config()
    words = ["federate", c.model, "--data", c.data, "--out", str(c.out), "--experts", "2", "--clients", "5",
             "--clients-per-round", "3", "--rounds", "2", "--local-steps", "1", "--gate-pretraining-steps", "2"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["smartmops", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 3
    assert "fewer than 2 of 3 clients" in " ".join(capsys.readouterr().err.split())


def test_a_third_of_the_clients_failing_at_random_costs_little(
    config: Make, with_transport: Any, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"clients": 10, "clients_per_round": 5, "rounds": 20, "local_steps": 3, "eval_every": 20}
    clean = federate(config(out=tmp_path / "clean", **options))
    with_transport(lambda inner: Faulty(inner, silent, probability=0.3))
    struck = federate(config(out=tmp_path / "struck", **options))
    assert struck["clients_failed"] > 10
    start = clean["rounds"][0]["perplexity"]["overall"]
    gained = [start - each["perplexity"]["overall"] for each in (clean, struck)]
    assert gained[0] > 0 and gained[1] > 0.8 * gained[0]
