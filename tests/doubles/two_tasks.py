"""A run of two tasks on a random base of 4 layers, who answers with it, and questions of both tasks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from patient import Patient
from smartmops.flow.trainer import TrainConfig, train
from smartmops.rows.example import Example
from smartmops.serving.answering import Answerer, Question, Settings
from stored import narrow

SHORT, LONG = Example("apple number 3.", "", ""), Example("banana number 4, and much more of it.", "A text.", "")
TALK = Example("And now?", "", "", system="Be brief.", history=(("apple number 1.", "AAAA"),))
GREEDY = Settings(max_new_tokens=12)


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


def mixed(answerer: Answerer, settings: Settings = GREEDY) -> list[Question]:
    """Questions of both tasks, to the gate, to each expert and to the base."""
    return [
        answerer.ask(SHORT, settings), answerer.ask(LONG, replace(settings, max_new_tokens=5), expert="apple"),
        answerer.ask(SHORT, settings, expert="banana"), answerer.ask(TALK, settings, base=True),
        answerer.ask(LONG, settings), answerer.complete("apple is", settings),
    ]  # fmt: skip
