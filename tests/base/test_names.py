"""What MODEL may be, and what is said where there is none: one line, at once, with the ways out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError

from smartmops.base import describe, load_base, local, names
from smartmops.tiny import BASE


class Hub:
    """Answers for the hub, and counts how often it is asked."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.asked = answer, 0

    def model_info(self, model: str, timeout: float) -> Any:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.answer])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def answering(answer: Any) -> Hub:
        found = Hub(answer)
        monkeypatch.setattr(names, "HfApi", lambda: found)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        return found

    names._of_hub.cache_clear()
    yield answering
    names._of_hub.cache_clear()


def no_such() -> RepositoryNotFoundError:
    return RepositoryNotFoundError("404", response=httpx.Response(404, request=httpx.Request("GET", "http://hub")))


def told(error: type[Exception], model: str) -> str:
    with pytest.raises(error) as found:
        local(model)
    assert "\n" not in str(found.value)
    return str(found.value)


def test_tiny_is_the_embedded_model() -> None:
    assert local("tiny") == str(BASE)


def test_a_hub_id_is_asked_for_once_and_stays_a_hub_id(hub: Any) -> None:
    api = hub(["config.json", "model.safetensors"])
    assert local("owner/Model-2.5-0.5B") == local("owner/Model-2.5-0.5B") == "owner/Model-2.5-0.5B"
    assert api.asked == 1
    assert describe("owner/Model-2.5-0.5B") == {"name": "owner/Model-2.5-0.5B"}


def test_a_name_that_the_hub_does_not_know_is_one_line(hub: Any) -> None:
    api = hub(no_such())
    said = told(FileNotFoundError, "nosuchmodel")
    assert said.startswith("MODEL nosuchmodel is no folder here, not built in") and "smollm2 or tiny" in said
    assert api.asked == 1


@pytest.mark.parametrize("error", [httpx.ConnectError("no route"), OSError("no route"), TimeoutError("no route")])
def test_a_hub_that_is_not_reached_is_asked_once(hub: Any, error: Exception) -> None:
    api = hub(error)
    said = told(OSError, "nosuchmodel")
    assert "the hub cannot be asked (no route): go online once" in said
    assert api.asked == 1


def test_no_question_is_asked_where_that_is_forbidden(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    api = hub([])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids" in told(FileNotFoundError, "nosuchmodel")
    assert api.asked == 0


def test_a_hub_model_of_gguf_files_alone_names_the_way(hub: Any) -> None:
    hub(["a.Q4_K_M.gguf", "README.md"])
    assert "download one with `hf download` and give its path" in told(FileNotFoundError, "owner/some-GGUF")


def test_what_the_hubs_cache_has_is_loaded_without_asking(
    hub: Any, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = hub(no_such())
    there = {file.name: str(file) for file in base_folder.iterdir()}
    monkeypatch.setattr(names, "try_to_load_from_cache", lambda model, name: there.get(name))
    model, tokenizer = load_base("owner/name")
    assert api.asked == 0 and len(tokenizer) == model.config.vocab_size
    assert model.config._name_or_path == model.name_or_path == "owner/name", "an adapter names its base, not a folder"
    assert describe("owner/name") == {"name": "owner/name"}


def test_a_cache_without_the_weights_is_no_model(hub: Any, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = hub(["config.json"])
    config = str(base_folder / "config.json")
    monkeypatch.setattr(names, "try_to_load_from_cache", lambda m, name: config if name == "config.json" else None)
    assert local("owner/name") == "owner/name" and api.asked == 1


@pytest.mark.parametrize("name", ["a/b/c", "name.gguf", "a model", ""])
def test_what_can_be_no_hub_id_is_not_asked_for(hub: Any, name: str, tmp_path: Path) -> None:
    api = hub([])
    if name:
        assert "does not exist: give a model folder" in told(FileNotFoundError, name)
    assert api.asked == 0


def test_a_file_that_is_no_gguf_is_refused(base_folder: Path) -> None:
    assert "only a *.gguf file is a model by itself" in told(ValueError, str(base_folder / "model.safetensors"))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    assert "has no config.json and no *.gguf file" in told(ValueError, str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "is an adapter, not a model: give the base" in told(ValueError, str(tmp_path))
