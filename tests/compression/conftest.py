"""The tiny models of the tuner's tests, a Llama saved as a model folder, prose to calibrate on, and one thread."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from smartmops.compression.compress import CompressConfig, compress
from stored import llama


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return llama(tmp_path_factory.mktemp("base"), tokenizer)


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of about 6,000 characters."""
    draw = random.Random(0)
    words = ["the", "answer", "of", "this", "question", "is", "name", "it", "text", "sound", "river", "stone", "reply"]
    text = ". ".join(" ".join(draw.choices(words, k=9)).capitalize() for _ in range(120))
    file = tmp_path_factory.mktemp("text") / "prose.txt"
    file.write_text(text)
    return file


@pytest.fixture(scope="session")
def configured(base_folder: Path, prose: Path) -> Callable[..., CompressConfig]:
    """A compression of `base_folder` by 2:4 unless told otherwise."""

    def make(out: Path, **changes: Any) -> CompressConfig:
        settings: dict[str, Any] = {
            "model": str(base_folder), "out": out, "calibration": str(prose), "sequences": 16,
            "sequence_length": 32, "batch_size": 4, "device": "cpu",
        }  # fmt: skip
        if not changes.keys() & {"sparsity", "pattern", "int8", "nf4"}:
            settings["pattern"] = "2:4"
        return CompressConfig(**settings | changes)

    return make


@pytest.fixture(scope="session")
def whole(configured: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2:4 by SparseGPT, uninterrupted."""
    out = tmp_path_factory.mktemp("whole") / "model"
    compress(configured(out))
    return out
