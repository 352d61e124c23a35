"""Fixtures of the rooms that open models: a tiny Llama as a model folder, and a cache of models for each test."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from stored import llama


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return llama(tmp_path_factory.mktemp("base"), tokenizer)


@pytest.fixture(autouse=True)
def _own_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("smollm2") is None:
        monkeypatch.setenv("SMARTMOPS_CACHE", str(tmp_path / "cache"))
