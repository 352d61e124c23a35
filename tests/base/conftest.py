"""A tiny Llama as a model folder, and the tiny models of the tuner's tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from stored import llama

sys.path.append(str(Path(__file__).parents[1] / "tuner"))  # for `tiny_models`


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return llama(tmp_path_factory.mktemp("base"), tokenizer)
