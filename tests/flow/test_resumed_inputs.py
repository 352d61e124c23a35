"""A run goes on with what it was begun with, and belongs to one process."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import smartmops as sm
from smartmops.checks.errors import RunError
from smartmops.flow import trainer
from smartmops.flow.compare import CompareConfig, compare
from smartmops.flow.trainer import TrainConfig, train
from smartmops.methods.baselines import load_run
from smartmops.serving.answering import Answerer

Make = Callable[..., TrainConfig]


@pytest.fixture
def killed(config: Make, two_tasks: Path, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A config of a run that was killed before training; its data and its base are copies of its own."""
    shutil.copy(two_tasks, tmp_path / "rows.jsonl")
    shutil.copytree(base_folder, tmp_path / "base")

    def make(**changes: Any) -> TrainConfig:
        return config(data=str(tmp_path / "rows.jsonl"), model=str(tmp_path / "base"), **changes)

    def kill(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(trainer, "fitted", kill)
        train(make())
    return make


def another(what: str) -> str:
    """The words of the refusal, as a regular expression."""
    return rf"another {what} \(fingerprint [0-9a-f]{{32}}, now [0-9a-f]{{32}}\): give"


def test_unchanged_it_goes_on(killed: Make) -> None:
    assert train(killed(resume=True))["tokens"]


def test_other_answers_of_the_same_name_are_refused(killed: Make, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[-1]["response"] += "!"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=another("data set")):
        train(killed(resume=True))


def test_other_weights_of_the_same_name_are_refused(killed: Make, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=another("base")):
        train(killed(resume=True))


def test_another_tokenizer_of_the_same_name_is_refused(killed: Make, tmp_path: Path) -> None:
    file = tmp_path / "base" / "tokenizer.json"
    known = json.loads(file.read_text())
    one, other = sorted(known["model"]["vocab"], key=known["model"]["vocab"].get)[-2:]
    vocab = known["model"]["vocab"]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    file.write_text(json.dumps(known))
    with pytest.raises(ValueError, match=another("tokenizer or template")):
        train(killed(resume=True))


def test_other_text_of_no_task_in_the_same_file_is_refused(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "unrelated.txt"
    file.write_text("\n\n".join(f"Nothing is asked in paragraph {i}." for i in range(24)))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(trainer, "fitted", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        train(config(unrelated=file))
    file.write_text(file.read_text().replace("Nothing", "Little"))
    with pytest.raises(ValueError, match=another("file of --unrelated")):
        train(config(unrelated=file, resume=True))


def test_the_folder_is_held_while_it_trains_and_given_back(killed: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bool] = []
    fitted = trainer.fitted
    monkeypatch.setattr(trainer, "fitted", lambda *args, **kwargs: (
        held.append((args[1].out / ".lock").is_file()), fitted(*args, **kwargs))[1])  # fmt: skip
    train(settings := killed(resume=True))
    assert held == [True]
    assert not (settings.out / ".lock").exists()


def test_a_comparison_goes_on_with_its_data_alone(config: Make, two_tasks: Path, tmp_path: Path) -> None:
    given = dict(vars(config()))
    settings = CompareConfig(**given | {"data": str(tmp_path / "rows.jsonl"), "methods": {"ia3": None}, "steps": 1,
                                        "shots": 0})  # fmt: skip
    shutil.copy(two_tasks, tmp_path / "rows.jsonl")
    compare(settings)
    (settings.out / "metrics.json").unlink()
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"instruction": "apple again.", "response": "A", "category": "a"}\n')
    settings.resume = True
    with pytest.raises(ValueError, match="another data set"):
        compare(settings)


@pytest.mark.parametrize("changed", ["a rule", "the vocabulary"])
def test_a_run_is_not_loaded_with_another_tokenizer(
    config: Make, base_folder: Path, tmp_path: Path, changed: str
) -> None:
    shutil.copytree(base_folder, tmp_path / "base")
    chosen = config(model=str(tmp_path / "base"), steps=1, samples_per_task=0)
    train(chosen)
    file = tmp_path / "base" / "tokenizer.json"
    words = json.loads(file.read_text())
    if changed == "a rule":
        words["normalizer"] = {"type": "Lowercase"}
    else:
        vocabulary = words["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(words))
    with pytest.raises(RunError, match=r"the tokenizer of .*base is not the one that .* was trained with, so the same"):
        load_run(chosen.out)


def test_from_another_folder_no_hub_is_asked_for_what_was_a_folder(
    config: Make, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "embedder"):
        shutil.copytree(base_folder, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    chosen = config(model="base", embedder="embedder", steps=1, samples_per_task=0)
    train(chosen)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(
        FileNotFoundError, match=r"MODEL base does not exist here, .* from another folder: bring it back"
    ):
        load_run(chosen.out)
    (chosen.out / "base").symlink_to(tmp_path / "base")
    with pytest.raises(RunError, match=r"the embedder embedder does not exist here, .* go to the folder that it was"):
        sm.load_run(chosen.out)


def test_a_run_is_not_loaded_with_another_embedder(config: Make, base_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(base_folder, tmp_path / "embedder")
    chosen = config(embedder=str(tmp_path / "embedder"), steps=4, save_every=2, samples_per_task=0)
    train(chosen)
    assert set(sm.load_run(chosen.out).gate("apple number 3.")) == {"a", "b"}
    file = tmp_path / "embedder" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "embed_tokens" in name)
    save_file(weights | {name: weights[name].flip(0).contiguous()}, file, {"format": "pt"})
    for load in (sm.load_run, Answerer.open):
        with pytest.raises(RunError, match=r"embedder is not the embedder that .* was trained with, its weights"):
            load(chosen.out)
    (chosen.out / "metrics.json").unlink()  # as a run that was killed
    with pytest.raises(RunError, match="was started with another embedder"):
        train(dataclasses.replace(chosen, resume=True))
