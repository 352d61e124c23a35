"""Two short runs on a random base of 4 layers: experts seen by answers, and experts of all layers seen by all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from smartmops.flow.trainer import TrainConfig, train
from stored import narrow

WORDS = ("apple", "banana", "cherry")
OPENING = "import sys\nassert not any(name.startswith('smartmops') for name in sys.modules)\n"
CLOSING = "\nassert not any(name.startswith('smartmops') for name in sys.modules)\n"


def _trained(folder: Path, base: Path, **options: Any) -> Path:
    rows = [{"instruction": f"{word} number {i}.", "response": word[0].upper() * 4, "category": word}
            for i in range(14) for word in WORDS]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(TrainConfig(
        model=str(base), dtype="float32", data=str(folder / "rows.jsonl"), out=folder / "run", experts=len(WORDS),
        prompts_per_expert=3, steps=12, batch_size=4, max_length=96, samples_per_task=1, validation_share=0.0,
        prompt_lr=0.3, **options,
    ))  # fmt: skip
    return folder / "run"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return narrow(tmp_path_factory.mktemp("base"), tokenizer)


@pytest.fixture(scope="session")
def by_answers(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """As `train` does it unless told otherwise."""
    return _trained(tmp_path_factory.mktemp("answers"), base, null_expert=True)


@pytest.fixture(scope="session")
def by_all(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return _trained(tmp_path_factory.mktemp("all"), base, injection_layer=0, visible_to="all", shared_prompts=2,
                    null_expert=False)  # fmt: skip


@pytest.fixture(scope="session")
def elsewhere() -> Callable[..., Any]:
    """Runs a program in an interpreter that never imports smartmops; what it prints is JSON."""

    def run(program: str, *words: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-c", OPENING + program + CLOSING, *words], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    return run
