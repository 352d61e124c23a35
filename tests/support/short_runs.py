"""Fixtures of the rooms that train: a base of 4 layers saved as a model folder, two tasks as JSONL, and a short training config over both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from smartmops.flow.trainer import TrainConfig
from stored import narrow


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return narrow(tmp_path_factory.mktemp("base"), tokenizer)


@pytest.fixture(scope="session")
def two_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 examples: answers of task "a" are all A, those of task "b" all B."""
    file = tmp_path_factory.mktemp("data") / "two.jsonl"
    rows = [
        {"instruction": f"{word} number {i}.", "response": word[0].upper() * 4, "category": word[0]}
        for i in range(20)
        for word in ("apple", "banana")
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def config(base_folder: Path, two_tasks: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(**changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "model": str(base_folder), "dtype": "float32", "data": str(two_tasks), "out": tmp_path / "run", "experts": 2,
            "prompts_per_expert": 3, "steps": 8, "batch_size": 4, "max_length": 96, "log_every": 1, "save_every": 4,
            "gate_pretraining_steps": 20, "samples_per_task": 0, "recovery_prompts": 0,
            "expert_kind": "hidden_states", "prompt_lr": 0.3, "gate_lr": 1e-3, "validation_share": 0.0,
        }  # fmt: skip
        return TrainConfig(**(settings | changes))

    return make
