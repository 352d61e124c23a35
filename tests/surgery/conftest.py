"""A run of three tasks on a random base of 4 layers with a null expert, and examples of a fourth task."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import smartmops as sm
from stored import narrow

WORDS = ("apple", "banana", "cherry")


def rows_of(words: tuple[str, ...], count: int = 24) -> str:
    rows = [
        {"instruction": f"{word} {word} number {i}.", "response": word[0].upper() * 4, "category": word}
        for i in range(count)
        for word in words
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Base, data, and the run."""
    folder = tmp_path_factory.mktemp("surgery")
    narrow(folder / "base", tokenizer)
    (folder / "three.jsonl").write_text(rows_of(WORDS))
    (folder / "new.jsonl").write_text(rows_of(("date",)))
    sm.train(model=str(folder / "base"), dtype="float32", data=str(folder / "three.jsonl"), out=folder / "run",
             experts=3, prompts_per_expert=3, steps=20, batch_size=4, max_length=96, samples_per_task=0,
             prompt_lr=0.3)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def run(folder: Path) -> Path:
    return folder / "run"


@pytest.fixture(scope="session")
def added(folder: Path, run: Path) -> tuple[Path, dict]:  # type: ignore[type-arg]
    """The run with a fourth expert, and what was told of it."""
    found = sm.add_expert(run, data=str(folder / "new.jsonl"), out=folder / "added", steps=20, relative_lr=0.3)
    return folder / "added", found


@pytest.fixture(scope="session")
def adapter_of() -> Callable[[Path], dict]:  # type: ignore[type-arg]
    """The tensors of a run's adapter, by short name."""
    from safetensors.torch import load_file

    def load(path: Path) -> dict:  # type: ignore[type-arg]
        found = load_file(path / "adapter" / "adapter_model.safetensors")
        return {name.rpartition(".")[2]: value for name, value in found.items()}

    return load
