"""A run of two tasks on a random base of 4 layers, and who answers with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from patient import Patient
from smartmops.flow.trainer import TrainConfig, train
from smartmops.serving.answering import Answerer
from stored import narrow


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    narrow(folder / "base", tokenizer)
    rows = [
        {"instruction": f"{word} number {i}.", "response": word[0].upper() * 4, "category": word}
        for i in range(20)
        for word in ("apple", "banana")
    ]
    (folder / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(TrainConfig(
        model=str(folder / "base"), dtype="float32", data=str(folder / "two.jsonl"), out=folder / "run", experts=2,
        prompts_per_expert=3, steps=12, batch_size=4, max_length=96, samples_per_task=0, null_expert=False,
        validation_share=0.0, prompt_lr=0.3,
    ))  # fmt: skip
    return folder / "run"


@pytest.fixture(scope="session")
def answerer(run: Path) -> Answerer:
    return Answerer.open(run)


@pytest.fixture
def patient() -> Iterator[Patient]:
    found = Patient()
    yield found
    found.let_go = True
