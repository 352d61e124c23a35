"""A federation from end to end in one process: against central training, across a kill, with bad settings and clients."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.filesize import decimal
from safetensors.torch import load_file
from torch import Tensor

from faulty import full_disk, struck
from federation import write
from smartmops import cli
from smartmops.analysis.finished import _seen
from smartmops.base import load_base
from smartmops.checks.errors import RunError
from smartmops.data.tasks import read, splits
from smartmops.evaluation.measure import measured
from smartmops.federated import client as client_module
from smartmops.federated import federate as module
from smartmops.federated.client import arrays_of
from smartmops.federated.federate import FederateConfig, InProcess, federate, local_of, worker_of
from smartmops.federated.rounds import chosen, seed_of
from smartmops.fitting.loop import fit
from smartmops.methods.baselines import load_run
from smartmops.options.training import Schedule
from smartmops.preparing.adapting import adapt
from smartmops.reading.task import Task
from smartmops.runs.folder import Run
from smartmops.settings.writing import versions

Make = Callable[..., FederateConfig]
Once = Callable[..., Path]


class Killed(BaseException):
    """As kill -9."""


def killed() -> None:
    raise Killed


def adapter(out: Path) -> dict[str, Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("method", ["mops", "fedprompt"])
def test_one_client_that_holds_everything_trains_as_the_centre_does(config: Make, tmp_path: Path, method: str) -> None:
    settings = config(clients=1, clients_per_round=1, rounds=1, local_steps=12, method=method)
    federate(settings)
    base, tokenizer = load_base(settings.model, "float32")
    task = Task.load(settings.central(), base, tokenizer)
    model, _, _ = adapt(task, settings.central(), settings, settings.seed)
    schedule = Schedule(steps=12, batch_size=2, warmup_steps=0, lr_schedule="constant", max_grad_norm=1.0,
                        seed=seed_of(0, 1, 0))  # fmt: skip
    rates = replace(settings.central(), prompt_lr=local_of(settings).prompt_lr, gate_lr=local_of(settings).gate_lr)
    fit(model, rates, schedule, *task.feed(model), tmp_path / "central")
    central = {name.removesuffix(".default"): value.detach() for name, value in arrays_of(model)[0].items()}
    found = adapter(settings.out)
    assert central.keys() <= found.keys()
    for name, value in central.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


def test_rounds_lower_the_perplexity_and_every_byte_is_counted_and_told(
    config: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(rounds=4, local_steps=10)
    metrics = federate(settings)
    first, *others = metrics["rounds"]
    assert metrics["perplexity"]["overall"] < 0.9 * first["perplexity"]["overall"]
    assert first["perplexity"]["overall"] > 1 and len(others) == 4
    for row in others:
        assert (row["clients_ok"], row["clients_failed"]) == (3, 0)
        assert row["bytes_up"] > 3 * 4 * metrics["trainable_parameters"] and row["bytes_down"] > row["bytes_up"]
        assert len(row["mass"]) == 2 and sum(row["mass"]) == pytest.approx(1)
        assert -1 <= row["drift"]["cosine_mean"] <= 1 and row["drift"]["distance_mean"] > 0
        assert row["perplexity"]["per_task"].keys() == {"a", "b"}
    assert metrics["bytes_up"] == sum(row["bytes_up"] for row in others)
    down, up = (decimal(metrics[name]) for name in ("bytes_down", "bytes_up"))
    told = " ".join(capsys.readouterr().out.split())
    assert all(f"round {number}: 3 answers, 0 failed; " in told for number in (1, 2, 3, 4))
    assert f"{decimal(metrics['bytes_down'] + metrics['bytes_up'])} so far; perplexity" in told
    assert f"sent to clients {down}, received {up} in 4 rounds; 0 answers failed" in told
    run = Run.open(settings.out)
    assert all(len(row["gates"]["a"]) == 2 for row in run.read_curves())
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
    assert measured(task, model).overall == pytest.approx(metrics["perplexity"]["overall"], rel=1e-5)
    card = (settings.out / "adapter" / "README.md").read_text()
    assert f" {metrics['perplexity']['overall']:.2f} |\n\nOne run: rounds {settings.rounds}" in card


@pytest.mark.parametrize("aggregation", ["uniform", "fedadam", "trimmed-mean", "median", "expert-weighted"])
def test_every_aggregation_goes_end_to_end(config: Make, once: Once, aggregation: str) -> None:
    other = config(aggregation=aggregation)
    metrics = federate(other)
    assert torch.isfinite(torch.tensor(metrics["perplexity"]["overall"]))
    assert not same(adapter(once()), adapter(other.out))


ALONG = ({}, {"aggregation": "fedadam"}, {"server_steps": 2}, {"method": "fedlora"})
KILLS = [(moment, number, options) for moment, number in (("between rounds", 2), ("within a round", 2), ("within a round", 1))
         for options in ALONG]  # fmt: skip


@pytest.mark.parametrize(("moment", "number", "options"), [*KILLS, ("within a checkpoint", 2, {})])
def test_a_killed_server_resumes_to_the_same_arrays(
    config: Make, once: Once, moment: str, number: int, options: dict[str, Any]
) -> None:
    whole, settings = once(**options), config(**options)
    with struck(moment, number, killed), pytest.raises(Killed):
        federate(settings)
    metrics = federate(replace(settings, resume=True))
    assert same(adapter(whole), adapter(settings.out))
    wanted = json.loads((whole / "metrics.json").read_text())
    timeless = [
        [{k: v for k, v in row.items() if k not in ("seconds", "bytes_up")} for row in each["rounds"]]
        for each in (wanted, metrics)  # an answer says how long it took, in as many digits as that needs
    ]
    assert timeless[0] == timeless[1]
    assert [r["step"] for r in Run.open(settings.out).read_curves()] == [0, 1, 2, 3]


def test_a_full_disk_at_a_checkpoint_loses_nothing(config: Make, once: Once) -> None:
    settings = config()
    with (
        struck("within a checkpoint", 2, full_disk),
        pytest.raises(OSError, match=r"checkpoint of round 2 .*No space left.*--resume"),
    ):
        federate(settings)
    assert [file.name for file in (settings.out / "checkpoints").iterdir()] == ["round.safetensors"]
    federate(replace(settings, resume=True))
    assert same(adapter(once()), adapter(settings.out))


def test_a_damaged_checkpoint_is_named(config: Make) -> None:
    settings = config()
    with struck("between rounds", 2, killed), pytest.raises(Killed):
        federate(settings)
    file = settings.out / "checkpoints" / "round.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"round\.safetensors is damaged .* remove it"):
        federate(replace(settings, resume=True))


def test_a_resumed_federation_has_the_clients_that_it_was_begun_with(
    config: Make, clients_folder: Path, tmp_path: Path
) -> None:
    files = shutil.copytree(clients_folder, tmp_path / "clients")
    settings = config(clients_data=files, clients_per_round=2)
    with struck("between rounds", 2, killed), pytest.raises(Killed):
        federate(settings)
    own = (files / "only_a.jsonl").read_text()
    write(files / "only_a.jsonl", [json.loads(line) | {"response": "AAAB"} for line in own.splitlines()])
    with pytest.raises(RunError, match=r"started with another file of client 'only_a' \(fingerprint \w{32}, now"):
        federate(replace(settings, resume=True))
    (files / "only_a.jsonl").write_text(own)
    shutil.copy(files / "only_a.jsonl", files / "fourth.jsonl")
    with pytest.raises(RunError, match="started with another list of clients"):
        federate(replace(settings, resume=True))
    (files / "fourth.jsonl").unlink()
    assert federate(replace(settings, resume=True))["clients"] == 3


def test_a_federation_that_its_user_has_to_mend_is_not_begun(config: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of 60 clients have nothing"):
        federate(config(clients=60))
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize("server_steps", [0, 1])
def test_what_a_federation_was_trained_on_is_its_clients_data(
    config: Make, clients_folder: Path, server_steps: int
) -> None:
    settings = config(clients_data=clients_folder, clients_per_round=1, rounds=1, server_steps=server_steps)
    federate(settings)
    run, (client, own) = Run.open(settings.out), (read(clients_folder / "both.jsonl"), read(settings.data)[24:])
    (said,) = _seen(run, client)
    assert said.startswith("8 of 8 examples are of the data that")
    train, _ = splits(settings.data)
    of_server = sum(example in train for example in own) * server_steps
    assert [each.split()[0] for each in _seen(run, own)] == ([str(of_server)] if of_server else [])
    run.config["arguments"] |= {"clients_data": None, "keys": "keys"}
    *said, last = _seen(run, own)
    assert len(said) == bool(of_server) and last.startswith(f"the data of {run.path}'s clients are not here")


def test_that_files_of_clients_have_changed_is_noticed(config: Make, clients_folder: Path, tmp_path: Path) -> None:
    files = shutil.copytree(clients_folder, tmp_path / "clients")
    settings = config(clients_data=files, clients_per_round=1, rounds=1)
    federate(settings)
    run, held = Run.open(settings.out), read(files / "both.jsonl")
    assert [said.split()[0] for said in _seen(run, held)] == ["8"]
    own = (files / "only_a.jsonl").read_text()
    changes: list[Callable[[], Any]] = [
        lambda: (files / "only_a.jsonl").write_text(own.replace("AAAA", "AAAB", 1)),
        (files / "only_a.jsonl").unlink, lambda: shutil.copy(files / "both.jsonl", files / "fourth.jsonl"),
    ]  # fmt: skip
    for change in changes:
        change()
        (said,) = _seen(run, held)
        assert said.startswith(
            f"whether {run.path} was trained on some of these examples cannot be told (the files of "
        )
        assert "clients have changed since it was trained (fingerprint" in said
        (files / "only_a.jsonl").write_text(own)
        (files / "fourth.jsonl").unlink(missing_ok=True)
    assert [said.split()[0] for said in _seen(run, held)] == ["8"]


def test_the_command_draws_who_holds_what(config: Make, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'smartmops[report]'")
    settings = config(rounds=1)
    cli.federate_command(settings)
    assert (settings.out / "holdings.png").read_bytes().startswith(b"\x89PNG")
    assert "who holds what" in capsys.readouterr().out


@pytest.mark.parametrize(("frozen", "gained"), [(1.0, False), (1e9, True)])
def test_the_command_says_that_nothing_was_gained_as_train_does(
    config: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, frozen: float, gained: bool
) -> None:
    def beside(*given: Any) -> Any:
        made, found = prepared(*given)
        return made, replace(found, test=replace(found.test, overall=frozen))

    prepared = module.adapted
    monkeypatch.setattr(module, "adapted", beside)
    settings = config(rounds=1, local_steps=1)
    assert cli.federate_command(settings)["gained"] is gained
    said = " ".join(capsys.readouterr().out.split())
    assert ("Nothing was gained: on the test split " in said and "or more --rounds." in said) is not gained
    card = (settings.out / "adapter" / "README.md").read_text()
    assert ("**Nothing was gained over the frozen base.**" in card) is not gained


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


def test_half_precision_halves_what_is_sent_and_ends_close_by(config: Make, once: Once) -> None:
    whole = Run.open(once(prompts_per_expert=40)).read_metrics()
    half = federate(config(prompts_per_expert=40, payload="float16"))
    assert half["bytes_up"] < 0.65 * whole["bytes_up"] and half["bytes_down"] < 0.7 * whole["bytes_down"]
    assert half["perplexity"]["overall"] == pytest.approx(whole["perplexity"]["overall"], rel=0.02)


def test_fewer_experts_are_fewer_bytes(config: Make, once: Once) -> None:
    whole = Run.open(once(prompts_per_expert=40)).read_metrics()
    some = federate(config(prompts_per_expert=40, share_above=0.55))
    assert some["bytes_up"] < 0.9 * whole["bytes_up"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clients": 2}, "--clients-per-round 3, but there are 2 clients: choose 1 to 2"),
        ({"quorum": 4}, "--quorum 4, but 3 clients are asked in a round: choose 1 to 3"),
        ({"rounds": 0}, "--rounds 0: choose 1 or more"),
        (
            {"clients": 60},
            r"of 60 clients have nothing .*'client \d\d': 108 rows are shared out among 60: .* --skew, more",
        ),
        (
            {"clients": 60, "partition": "dirichlet"},
            "choose fewer --clients, a larger --dirichlet-alpha, more data, or",
        ),
        ({"method": "fedprompt", "aggregation": "expert-weighted"}, "expert-weighted"),
        ({"expert_names": ("a", "c")}, "--expert-names a c lack category 'b'"),
        ({"noise_multiplier": 1.0, "aggregation": "median"}, "plain averaging"),
    ],
)
def test_what_cannot_work_is_refused_before_any_training(
    config: Make, options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "train_locally", lambda *args: pytest.fail("trained"))
    with pytest.raises(ValueError, match=said):
        federate(config(**options))


def test_other_bases_tasks_and_versions_are_refused_before_any_training(
    config: Make, clients_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "train_locally", lambda *args: pytest.fail("trained"))
    monkeypatch.setattr(client_module, "train_locally", lambda *args: pytest.fail("trained"))
    other, tokenizer = load_base(config().model, "float32")
    with torch.no_grad():
        next(other.parameters()).view(-1)[7] += 1e-3  # one weight of the base, by a little
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    elsewhere = worker_of(config(model=str(tmp_path / "other")))
    with pytest.raises(ValueError, match="another base model, tokenizer or template"):
        federate(config(out=tmp_path / "a"), lambda _: InProcess(elsewhere))
    files = tmp_path / "clients"
    shutil.copytree(clients_folder, files)
    write(files / "zoo.jsonl", [{"instruction": "Zebra.", "response": "Z", "category": "z"}])
    with pytest.raises(ValueError, match="'zoo' holds category 'z', which the gate does not know"):
        federate(config(out=tmp_path / "b", clients_data=files))
    monkeypatch.setattr(client_module, "versions", lambda: versions() | {"torch": "1.0"})
    with pytest.raises(ValueError, match=r"runs torch 1\.0, the server"):
        federate(config(out=tmp_path / "c"))


def test_the_gate_is_pretrained_on_instructions_of_the_server_that_nobody_labelled(
    config: Make, clients_folder: Path, two_tasks: Path, tmp_path: Path
) -> None:
    unlabelled = [json.loads(line) for line in two_tasks.read_text().splitlines()]
    data = write(tmp_path / "server.jsonl", [{k: v for k, v in row.items() if k != "category"} for row in unlabelled])
    metrics = federate(config(data=str(data), clients_data=clients_folder, gate_pretraining="clusters"))
    gates = Run.open(config().out).read_gates()
    assert gates is not None and len(gates["experts"]) == 2
    assert metrics["gate_pretraining_accuracy"] > 0.9 and metrics["clients"] == 3
    assert metrics["perplexity"]["overall"] < metrics["rounds"][0]["perplexity"]["overall"]
