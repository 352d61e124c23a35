"""From config to run folder: every method, resuming after a kill, and what stops a run."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from smartmops.base import load_base
from smartmops.checks.errors import ConfigError, DataError, Diverged, ResourceError, RunError
from smartmops.evaluation.perplexity import evaluate
from smartmops.fitting import loop
from smartmops.flow import trainer
from smartmops.flow.compare import CompareConfig, compare
from smartmops.flow.steps import opened
from smartmops.flow.trainer import TrainConfig, train
from smartmops.methods.baselines import load_run
from smartmops.reading import task as task_module
from smartmops.reading.task import Task
from smartmops.rows.stored import Stored
from smartmops.runs.checkpoints import last_checkpoint
from smartmops.runs.folder import PATHS, Run
from smartmops.states.fingerprint import sampled

Make = Callable[..., TrainConfig]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("method", ["mops", "prompt-tuning", "input-prompt-tuning", "lora", "ia3"])
def test_every_method_lowers_the_loss_and_is_loaded_as_it_was_saved(config: Make, method: str) -> None:
    rate = {"lora": 1e-2, "ia3": 0.1}.get(method, 0.3)
    chosen = config(method=method, steps=30, prompt_lr=rate, recovery_prompts=2, save_every=100, samples_per_task=1)
    metrics = train(chosen)
    assert metrics["perplexity"]["overall"] < 0.95 * metrics["perplexity_frozen"]["overall"]
    model, _, run = load_run(chosen.out)
    assert run.read_metrics() == metrics
    shown = set() if method == "input-prompt-tuning" else {"a", "b"}  # it generates no answers
    assert {row["category"] for row in run.read_samples()} == shown
    task = Task.load(dataclasses.replace(chosen, recovery_prompts=0))
    assert evaluate(model, task.test, task.collator).overall == pytest.approx(
        metrics["perplexity"]["overall"], rel=1e-5
    )


def test_a_run_folder_holds_curves_gates_and_samples(config: Make) -> None:
    chosen = config(eval_every=4, validation_share=0.1, samples_per_task=1)
    metrics = train(chosen)
    run = Run.open(chosen.out)
    rows = run.read_curves()
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    assert [row["step"] for row in rows if "eval_perplexity" in row] == [4, 8]
    gates = run.read_gates()
    assert gates is not None and gates["experts"] == ["a", "b"]
    for when in ("before", "during", "after"):
        for weights in gates[when].values():
            assert 0.9 < sum(weights) < 1 + 1e-5, "what is missing is the null expert's"
    assert gates["before"]["a"][0] > 0.9 and gates["before"]["b"][1] > 0.9, "labels pretrain the gate one to one"
    assert metrics["gate_pretraining_accuracy"] == 1.0
    assert {row["category"] for row in run.read_samples()} == {"a", "b"}
    assert metrics["trainable_parameters"] == 2 * 3 * 32 + 64 * 32 + 2 * 64


def test_data_may_be_called_as_a_home_is(config: Make, two_tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = config(steps=0, data="~backup.jsonl")
    monkeypatch.chdir(chosen.out.parent)
    Path("~backup.jsonl").write_bytes(two_tasks.read_bytes())
    train(chosen)
    assert "~backup.jsonl" in Run.open(chosen.out).config[PATHS]


def test_first_columns_that_stay_are_not_counted_as_trained(config: Make) -> None:
    metrics = train(config(steps=0, freeze_first_column=True))
    assert metrics["trainable_parameters"] == 2 * 2 * 32 + 64 * 32 + 2 * 64


def test_clusters_and_no_pretraining_and_an_external_embedder(config: Make, tmp_path: Path, base_folder: Path) -> None:
    train(config(out=tmp_path / "c", gate_pretraining="clusters"))
    gates = Run.open(tmp_path / "c").read_gates()
    assert gates is not None and gates["experts"] == ["cluster 0", "cluster 1"]
    plain = train(config(out=tmp_path / "n", gate_pretraining="none"))
    assert plain["gate_pretraining_accuracy"] is None
    outside = train(config(out=tmp_path / "e", embedder=str(base_folder)))
    assert outside["gate_pretraining_accuracy"] == 1.0
    assert load_run(tmp_path / "e")[0].peft_config["default"].embedding_size == 32


def test_same_seed_same_adapter_other_seed_other_adapter(config: Make, tmp_path: Path) -> None:
    found = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        train(config(out=tmp_path / name, seed=seed, steps=3))
        found.append(adapter(tmp_path / name))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not all(torch.equal(found[0][name], found[2][name]) for name in found[0])


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(config: Make, tmp_path: Path) -> None:
    whole, killed = (config(out=tmp_path / name, steps=24, save_every=4, log_every=5) for name in ("whole", "killed"))
    train(whole)
    source = (
        f"import json, os, pathlib, signal, sys, torch; torch.set_num_threads({torch.get_num_threads()})\n"
        "from smartmops.fitting import loop\n"
        "from smartmops.flow.trainer import TrainConfig, train\n"
        "values = json.loads(sys.argv[1]); values['out'] = pathlib.Path(values['out'])\n"
        "die_at, step = int(sys.argv[2]), loop.Trainer.training_step\n"
        "def dies(self, *args, **named):\n"
        "    if self.state.global_step == die_at: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, *args, **named)\n"
        "loop.Trainer.training_step = dies\n"
        "train(TrainConfig(**values))"
    )
    values = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(killed).items()}
    command = [sys.executable, "-c", source]
    died = subprocess.run([*command, json.dumps(values), "10"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert died.returncode == -signal.SIGKILL and not Run.open(killed.out, unfinished=True).finished
    assert [path.name for path in sorted(killed.out.glob("checkpoints/checkpoint-*"))][-1] == "checkpoint-8"
    command += [json.dumps(values | {"resume": True}), "-1"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    first, second = adapter(whole.out), adapter(killed.out)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    logged = [[row for row in Run.open(each.out).read_curves() if "loss" in row] for each in (whole, killed)]
    assert logged[0] == logged[1] and len(logged[0]) == 4, "each step is in one mean, and none in two"


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path, config: Make) -> None:
    train(config())
    run = Run.open(tmp_path / "run")
    newest = last_checkpoint(run.checkpoints)
    assert newest is not None and newest.name == "checkpoint-8"
    (newest / "trainer_state.json").unlink()
    older = last_checkpoint(run.checkpoints)
    assert older is not None and older.name == "checkpoint-4" and not newest.exists()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(
    config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = loop.Trainer.training_step
    good: list[torch.Tensor] = []

    def poisoned(self: loop._Trainer, *args: object, **kwargs: object) -> torch.Tensor:
        loss = parent(self, *args, **kwargs)
        if self.state.global_step == 4:
            for parameter in self._trained():
                parameter.data.fill_(float("nan"))
            return loss * float("nan")
        good[:] = [p.detach().clone() for p in self._trained()]
        return loss

    monkeypatch.setattr(loop.Trainer, "training_step", poisoned)
    chosen = config(prompt_lr=0.07)
    with pytest.raises(Diverged, match=r"step 5 with learning rate 0.07: choose a smaller prompt_lr.*adapter"):
        train(chosen)
    kept = adapter(chosen.out)
    prompts = next(v for k, v in kept.items() if k.endswith("mops_prompts"))
    assert any(p.shape == prompts.shape and torch.equal(p, prompts) for p in good)
    assert all(torch.isfinite(v).all() for v in kept.values())
    assert not Run.open(chosen.out, unfinished=True).finished


@pytest.mark.parametrize("there", [False, True])
def test_what_the_user_has_to_mend_before_training_leaves_the_name_free(
    config: Make, tmp_path: Path, there: bool
) -> None:
    if there:
        (tmp_path / "run").mkdir()
    with pytest.raises(DataError, match="rows are too long for --max-length 4 "):
        train(config(max_length=4))
    assert [list(folder.iterdir()) for folder in tmp_path.iterdir()] == [[]] * there
    assert train(config(steps=0))["tokens"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory"),
                                   OSError(28, "No space left on device")])  # fmt: skip
def test_too_little_memory_before_training_leaves_the_name_free_and_a_full_disk_does_not(
    config: Make, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*args: Any, **named: Any) -> None:
        raise error

    chosen, full = config(), isinstance(error, OSError)
    monkeypatch.setattr(trainer, "adapted", fails)
    with pytest.raises(ResourceError, match="--resume" if full else "out of memory.*: lower --batch-size"):
        train(chosen)
    assert chosen.out.exists() == full


def test_a_comparison_leaves_the_name_free_with_a_base_that_was_pruned_for_it(config: Make, tmp_path: Path) -> None:
    given = dict(vars(config())) | {"methods": {"ia3": None}, "sparsity": 0.5, "shots": 0}
    with pytest.raises(DataError, match="rows are too long for --max-length 4 "):
        compare(CompareConfig(**given | {"max_length": 4}))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_is_kept_whatever_happens(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **named: Any) -> None:
        raise error("mend this")

    chosen = config()
    for error in (KeyboardInterrupt, RunError):
        monkeypatch.setattr(trainer, "adapted", fails)
        with pytest.raises(error):
            train(chosen)
        assert (chosen.out / "config.json").is_file()
        chosen.resume = True


def test_an_existing_run_is_refused_and_a_finished_one_is_not_trained_again(config: Make) -> None:
    metrics = train(config(steps=2))
    with pytest.raises(FileExistsError, match="finished run: choose another folder"):
        train(config(steps=2))
    assert train(config(steps=2, resume=True)) == metrics
    with pytest.raises(ValueError, match=r"arguments.steps=2, but now arguments.steps=3"):
        train(config(steps=3, resume=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"injection_layer": 40}, "--injection-layer 40, but this model has 4 layers: choose 0 to 3"),
        ({"experts": 0}, "--experts 0: choose 1 or more"),
        ({"experts": 1, "gate_top_k": 2}, "--gate-top-k 2, but there are 1 gate weights"),
        ({"model": "./nowhere"}, "MODEL ./nowhere does not exist"),
        ({"data": "nowhere.jsonl"}, "no such file"),
        ({"limit": 4000}, "--limit 4000, but there are 40 examples"),
    ],
)
def test_bad_input_names_value_limit_and_way_out(config: Make, changes: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace("(", r"\(")):
        train(config(**changes))


def test_a_run_is_not_loaded_on_another_base_of_the_same_name(config: Make, base_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(base_folder, tmp_path / "base")
    chosen = config(model=str(tmp_path / "base"), steps=2, samples_per_task=0)
    train(chosen)
    load_run(chosen.out)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(
        FileNotFoundError, match=r"base does not exist here, but .* was trained on it: bring it back, or link"
    ):
        load_run(chosen.out)
    (chosen.out / "base").symlink_to(tmp_path / "elsewhere")
    load_run(chosen.out)
    (chosen.out / "base").unlink()
    (tmp_path / "elsewhere").rename(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    name = next(name for name in weights if "down_proj" in name)
    weights[name] = weights[name] * 1.5
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        RunError, match=r"base is not the base that .* was trained on, its weights are others: bring that"
    ):
        load_run(chosen.out)


def test_a_base_is_known_again_in_another_dtype(base_folder: Path) -> None:
    whole, half = (sampled(load_base(str(base_folder), dtype)[0]) for dtype in ("float32", "bfloat16"))
    assert whole == half


def no_base(*given: Any) -> None:
    raise AssertionError(f"loaded a base: {given}")


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "folder"])
def test_more_tasks_than_experts_is_refused_before_a_base_is_loaded(
    config: Make, two_tasks: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pd.read_json(two_tasks, lines=True)
    table = pd.concat([table, pd.DataFrame([{"instruction": "cherry", "response": "CCC", "category": "c"}] * 5)])
    data = tmp_path / ("three" if form == "folder" else f"three.{form}")
    if form == "jsonl":
        table.to_json(data, orient="records", lines=True)
    elif form == "csv":
        table.to_csv(data, index=False)
    elif form == "parquet":
        table.to_parquet(data)
    else:
        data.mkdir()
        for name, rows in table.groupby("category"):
            rows.drop(columns="category").to_json(data / f"{name}.jsonl", orient="records", lines=True)
    monkeypatch.setattr(task_module, "load_base", no_base)
    said = "--experts 2, but there are 3 tasks: choose 3, or --gate-pretraining clusters"
    with pytest.raises(ConfigError, match=said):
        train(config(data=str(data)))


def test_more_tasks_than_experts_is_refused_by_compare_before_anything_is_trained(
    config: Make, two_tasks: Path, tmp_path: Path
) -> None:
    more = tmp_path / "three.jsonl"
    extra = {"instruction": "cherry", "response": "CCC", "category": "c"}
    more.write_text(two_tasks.read_text() + 5 * (json.dumps(extra) + "\n"))
    with pytest.raises(ConfigError, match="--experts 2, but there are 3 tasks"):
        opened(config(data=str(more)), *load_base(config().model))


def test_an_adapter_of_another_base_and_a_damaged_one_are_refused(config: Make, base_folder: Path) -> None:
    chosen = config(steps=2)
    train(chosen)
    file = chosen.out / "adapter" / "adapter_config.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps(stored | {"base_hidden_size": 4096}))
    with pytest.raises(ValueError, match="hidden size 4096, but this model has 32"):
        load_run(chosen.out)
    file.write_text(json.dumps(stored))
    tensors = chosen.out / "adapter" / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged or cut short"):
        load_run(chosen.out)


def test_a_bfloat16_base_trains_prompts_in_float32_to_nearly_the_same_perplexity(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    exact = train(config())["perplexity"]["overall"]
    half = train(config(dtype="bfloat16", out=tmp_path / "half"))["perplexity"]["overall"]
    assert half == pytest.approx(exact, rel=0.03)
    model, _, _ = load_run(tmp_path / "half")
    assert model.dtype == torch.bfloat16
    assert model.base_model.layer().mops_prompts["default"].dtype == torch.float32


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "mops"},
        {"method": "mops", "activations": "off", "hold_out": "a", "experts": 1},
        {"method": "mops", "recovery_prompts": 2, "recovery_steps": 2, "limit": 30, "gate_pretraining": "clusters"},
        {"method": "lora", "validation_share": 0.2},
    ],
)
def test_rows_on_disk_train_to_the_same_bits(config: Make, tmp_path: Path, settings: dict[str, Any]) -> None:
    here = config(**settings)
    there = config(**settings, out=tmp_path / "there", rows=str(tmp_path / "rows"))
    assert isinstance(Task.load(there).train, Stored)
    assert train(there) | {"seconds": None} == train(here) | {"seconds": None}
    one, other = adapter(here.out), adapter(there.out)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert list((tmp_path / "rows").iterdir()) == []
