"""The tiny models of the tuner's tests, a Llama saved as a model folder, prose to calibrate on, and one thread."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from smartmops.compression.compress import CompressConfig, compress

sys.path.append(str(Path(__file__).parents[1] / "tuner"))  # for `tiny_models`


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Llama of 3 layers whose widths every quantiser takes, with weights large enough that its predictions differ."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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
