"""A federation from end to end in one process: against central training, across a kill, with bad settings and clients."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from smartmops.compression.base import load_base
from smartmops.federated import federate as module
from smartmops.federated import rounds as rounds_module
from smartmops.federated.admission import admitted
from smartmops.federated.client import arrays_of
from smartmops.federated.federate import FederateConfig, InProcess, federate
from smartmops.federated.messages import Hello, pack
from smartmops.federated.rounds import State, chosen, seed_of
from smartmops.training.baselines import load_run
from smartmops.training.runs import Run, versions
from smartmops.training.task import Task
from smartmops.training.trainer import Schedule, fit

Make = Callable[..., FederateConfig]


class Killed(BaseException):
    """As kill -9."""


def adapter(out: Path) -> dict[str, Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("method", ["mops", "fedprompt"])
def test_one_client_that_holds_everything_trains_as_the_centre_does(config: Make, tmp_path: Path, method: str) -> None:
    settings = config(clients=1, clients_per_round=1, rounds=1, local_steps=12, method=method)
    federate(settings)
    base, tokenizer = load_base(settings.model)
    task = Task.load(settings.central(), base, tokenizer)
    model, _, _ = task.adapt(settings.central(), settings, settings.seed)
    schedule = Schedule(steps=12, batch_size=2, warmup_steps=0, lr_schedule="constant", seed=seed_of(0, 1, 0))
    fit(model, settings.central(), schedule, *task.feed(model), tmp_path / "central")
    central = {name.removesuffix(".default"): value.detach() for name, value in arrays_of(model)[0].items()}
    found = adapter(settings.out)
    assert central.keys() <= found.keys()
    for name, value in central.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


def test_rounds_lower_the_perplexity_and_every_byte_is_counted(config: Make) -> None:
    settings = config(rounds=4, local_steps=10)
    metrics = federate(settings)
    first, *others = metrics["rounds"]
    assert metrics["perplexity"]["overall"] < 0.9 * first["perplexity"]["overall"]
    assert first["perplexity"]["overall"] > 1 and len(others) == 4
    for row in others:
        assert (row["clients_ok"], row["clients_failed"]) == (3, 0)
        assert row["bytes_up"] > 3 * 4 * metrics["trainable_parameters"] and row["bytes_down"] > row["bytes_up"]
        assert len(row["mass"]) == 2 and sum(row["mass"]) == pytest.approx(1)
        assert -1 <= row["drift"]["cosine_mean"] <= 1
    assert metrics["bytes_up"] == sum(row["bytes_up"] for row in others)
    run = Run.open(settings.out)
    assert [row["step"] for row in run.read_curves()] == [0, 1, 2, 3, 4]
    gates = run.read_gates()
    assert gates is not None and gates["experts"] == ["a", "b"] and {"before", "during", "after"} <= gates.keys()
    held = metrics["holdings"]["table"]
    assert sum(map(sum, held.values())) == 108 and len(held["a"]) == 5


def test_the_adapter_of_a_finished_run_gives_the_perplexity_it_reports(config: Make) -> None:
    settings = config()
    metrics = federate(settings)
    model, tokenizer, _ = load_run(settings.out)
    task = Task.load(settings.central(), model, tokenizer)
    assert task.evaluate(model).overall == pytest.approx(metrics["perplexity"]["overall"], rel=1e-5)


@pytest.mark.parametrize("aggregation", ["uniform", "fedadam", "trimmed-mean", "median", "expert-weighted"])
def test_every_aggregation_goes_end_to_end(config: Make, tmp_path: Path, aggregation: str) -> None:
    plain = config(out=tmp_path / "plain")
    federate(plain)
    other = config(out=tmp_path / "other", aggregation=aggregation)
    metrics = federate(other)
    assert torch.isfinite(torch.tensor(metrics["perplexity"]["overall"]))
    assert not same(adapter(plain.out), adapter(other.out))


@pytest.mark.parametrize("options", [{}, {"aggregation": "fedadam"}, {"server_steps": 2}, {"method": "fedlora"}])
@pytest.mark.parametrize("moment", ["between rounds", "within a round", "before the first"])
def test_a_killed_server_resumes_to_the_same_arrays(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], moment: str
) -> None:
    whole = config(out=tmp_path / "whole", **options)
    federate(whole)
    settings = config(out=tmp_path / "killed", **options)
    with monkeypatch.context() as patch:
        kill(patch, moment)
        with pytest.raises(Killed):
            federate(settings)
    metrics = federate(replace(settings, resume=True))
    assert same(adapter(whole.out), adapter(settings.out))
    wanted = json.loads((whole.out / "metrics.json").read_text())
    timeless = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in each["rounds"]] for each in (wanted, metrics)
    ]
    assert timeless[0] == timeless[1]
    assert [r["step"] for r in Run.open(settings.out).read_curves()] == [0, 1, 2, 3]


def kill(patch: pytest.MonkeyPatch, moment: str) -> None:
    calls: list[int] = []

    def exchange(self: InProcess, jobs: Any, timeout: Any) -> Any:
        for answer in InProcess_exchange(self, jobs, timeout):
            calls.append(1)
            if len(calls) == {"within a round": 5, "before the first": 1}.get(moment):
                raise Killed
            yield answer

    def save(self: State, file: Path) -> None:
        State_save(self, file)
        if self.round == 2:
            raise Killed

    InProcess_exchange, State_save = InProcess.exchange, State.save
    patch.setattr(InProcess, "exchange", exchange)
    if moment == "between rounds":
        patch.setattr(State, "save", save)


def test_a_full_disk_at_a_checkpoint_loses_nothing(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = config(out=tmp_path / "whole")
    federate(whole)
    settings = config(out=tmp_path / "full")
    writes: list[int] = []
    real = rounds_module.save_file

    def full(tensors: Any, file: Path, metadata: Any) -> None:
        writes.append(1)
        if len(writes) == 3:
            file.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, file, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(rounds_module, "save_file", full)
        with pytest.raises(OSError, match=r"checkpoint of round 2 .*No space left.*--resume"):
            federate(settings)
    assert [file.name for file in (settings.out / "checkpoints").iterdir()] == ["round.safetensors"]
    federate(replace(settings, resume=True))
    assert same(adapter(whole.out), adapter(settings.out))


def test_a_damaged_checkpoint_is_named(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config()
    with monkeypatch.context() as patch:
        kill(patch, "between rounds")
        with pytest.raises(Killed):
            federate(settings)
    file = settings.out / "checkpoints" / "round.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"round\.safetensors is damaged .* remove it"):
        federate(replace(settings, resume=True))


def test_sampling_and_seeds_depend_on_seed_round_and_client_alone() -> None:
    assert chosen(1, 2, 0, range(100), 10) == chosen(1, 2, 0, list(range(100)), 10)
    drawn = [tuple(chosen(s, r, a, range(100), 10)) for s in range(3) for r in range(3) for a in range(3)]
    assert len(set(drawn)) == len(drawn) and all(sorted(set(each)) == list(each) for each in drawn)
    assert chosen(0, 1, 0, [3, 8], 10) == [3, 8]
    seeds = {seed_of(s, r, c) for s in range(5) for r in range(5) for c in range(-1, 20)}
    assert len(seeds) == 5 * 5 * 21 and all(0 <= seed < 2**31 for seed in seeds)


def test_clients_can_bring_files_of_their_own(config: Make, clients_folder: Path) -> None:
    metrics = federate(config(clients_data=clients_folder, clients_per_round=2, server_steps=3))
    assert metrics["clients"] == 3 and metrics["holdings"]["names"] == ["both", "only_a", "only_b"]
    assert metrics["holdings"]["table"] == {"a": [4, 8, 0], "b": [4, 0, 8]}
    assert metrics["perplexity"]["overall"] < metrics["rounds"][0]["perplexity"]["overall"]


def test_clients_without_examples_can_be_left_out(config: Make) -> None:
    metrics = federate(config(clients=60, skew=30.0, skip_empty=True))
    assert 3 <= metrics["clients"] < 60
    held = metrics["holdings"]
    assert len(held["names"]) == metrics["clients"]
    assert all(sum(counts[n] for counts in held["table"].values()) > 0 for n in range(metrics["clients"]))


def test_the_server_trains_on_its_own_examples_between_rounds(config: Make, tmp_path: Path) -> None:
    alone = federate(config(out=tmp_path / "alone", local_steps=1))
    helped = federate(config(out=tmp_path / "helped", local_steps=1, server_steps=20))
    assert helped["perplexity"]["overall"] < alone["perplexity"]["overall"]


def test_half_precision_halves_what_is_sent_and_ends_close_by(config: Make, tmp_path: Path) -> None:
    whole = federate(config(out=tmp_path / "whole", experts=2, prompts_per_expert=40))
    half = federate(config(out=tmp_path / "half", experts=2, prompts_per_expert=40, payload="float16"))
    assert half["bytes_up"] < 0.65 * whole["bytes_up"] and half["bytes_down"] < 0.7 * whole["bytes_down"]
    assert half["perplexity"]["overall"] == pytest.approx(whole["perplexity"]["overall"], rel=0.02)


def test_fewer_experts_are_fewer_bytes(config: Make, tmp_path: Path) -> None:
    whole = federate(config(out=tmp_path / "whole", prompts_per_expert=40))
    some = federate(config(out=tmp_path / "some", prompts_per_expert=40, share_above=0.55))
    assert some["bytes_up"] < 0.9 * whole["bytes_up"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clients": 2}, "clients_per_round=3, but there are 2 clients: choose 1 to 2"),
        ({"quorum": 4}, "quorum=4, but 3 clients are asked in a round: choose 1 to 3"),
        ({"rounds": 0}, "rounds=0: choose 1 or more"),
        ({"clients": 60}, "of 60 clients hold no examples"),
        ({"method": "fedprompt", "aggregation": "expert-weighted"}, "expert-weighted"),
        ({"expert_names": ("a", "c")}, "category 'b' is none of the expert_names"),
        ({"noise_multiplier": 1.0, "aggregation": "median"}, "plain averaging"),
    ],
)
def test_what_cannot_work_is_refused_before_any_training(
    config: Make, options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "train_locally", lambda *args: pytest.fail("trained"))
    with pytest.raises(ValueError, match=said):
        federate(config(**options))


def hello(**changes: Any) -> bytes:
    given = {"name": "x", "examples": 3, "categories": ["a"], "base": "own", "versions": versions() | {"messages": "1"}}
    return pack(Hello(**given | changes))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"examples": 0}, "'x' holds no examples"),
        ({"base": "other"}, "another base model or tokenizer"),
        ({"versions": versions() | {"messages": "1", "torch": "1.0"}}, r"runs torch 1\.0, the server .*--allow-other-versions"),
        ({"versions": versions() | {"messages": "7"}}, "runs messages 7, the server 1: install the same$"),
        ({"categories": ["a", "zebra"]}, "'zebra', which the gate does not know .*--gate-pretraining clusters"),
    ],
)  # fmt: skip
def test_a_client_that_does_not_belong_is_refused(config: Make, change: dict[str, Any], said: str) -> None:
    everyone = {0: hello(name="ok"), 1: hello(name="fine"), 2: hello(**change)}
    with pytest.raises(ValueError, match=said):
        admitted(everyone, config(), "own", ["a", "b"])


def test_clients_that_belong_are_numbered(config: Make) -> None:
    everyone = {n: hello(name=str(n), versions={"messages": "1"}) for n in range(3)}
    assert admitted(everyone, config(allow_other_versions=True), "own", ["a", "b"]) == [0, 1, 2]
    with pytest.raises(ValueError, match="clients_per_round=3, but there are 2 clients"):
        admitted({n: everyone[n] for n in range(2)}, config(), "own", [])
