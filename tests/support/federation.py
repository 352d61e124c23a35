"""Fixtures: a base of 4 layers, two tasks as JSONL, three clients' files, and a short federation over them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from smartmops.federated.federate import FederateConfig, federate
from stored import narrow


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return narrow(tmp_path_factory.mktemp("base"), tokenizer)


def rows(count: int) -> list[dict[str, str]]:
    return [
        {"instruction": f"{word} number {i}.", "response": word[0].upper() * 4, "category": word[0]}
        for i in range(count)
        for word in ("apple", "banana")
    ]


def write(file: Path, found: list[dict[str, str]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return file


@pytest.fixture(scope="session")
def two_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 examples: answers of task "a" are all A, those of task "b" all B."""
    return write(tmp_path_factory.mktemp("data") / "two.jsonl", rows(60))


@pytest.fixture(scope="session")
def clients_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clients' files: one has both tasks, the others one each."""
    folder, found = tmp_path_factory.mktemp("clients"), rows(12)
    write(folder / "both.jsonl", found[:8])
    write(folder / "only_a.jsonl", [row for row in found[8:] if row["category"] == "a"])
    write(folder / "only_b.jsonl", [row for row in found[8:] if row["category"] == "b"])
    return folder


def settings(base_folder: Path, two_tasks: Path, out: Path, changes: dict[str, Any]) -> FederateConfig:
    given: dict[str, Any] = {
        "model": str(base_folder), "data": str(two_tasks), "out": out, "experts": 2, "prompts_per_expert": 3,
        "clients": 5, "clients_per_round": 3, "rounds": 3, "local_steps": 4, "batch_size": 2, "skew": 3.0,
        "max_length": 96, "gate_pretraining_steps": 20, "samples_per_task": 0,
    }  # fmt: skip
    return FederateConfig(**(given | changes))


@pytest.fixture
def config(base_folder: Path, two_tasks: Path, tmp_path: Path) -> Callable[..., FederateConfig]:
    return lambda **changes: settings(base_folder, two_tasks, tmp_path / "run", changes)


@pytest.fixture(scope="session")
def once(base_folder: Path, two_tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The finished run folder of a federation, run once for all tests that compare with it."""
    done: dict[str, Path] = {}

    def run(**changes: Any) -> Path:
        key = repr(sorted(changes.items()))
        if key not in done:
            done[key] = tmp_path_factory.mktemp("once") / "run"
            federate(settings(base_folder, two_tasks, done[key], changes))
        return done[key]

    return run
