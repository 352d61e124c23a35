"""The dtype a base is loaded in, and what a stored quantised model needs installed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from smartmops.base import fast_dtype, load, load_base, quantised


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Pretend to be a machine without a GPU whose processor has these instructions."""

    def having(*instructions: str) -> torch.dtype:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
        monkeypatch.setattr(load, "_instructions", lambda: set(instructions))
        fast_dtype.cache_clear()
        return fast_dtype()

    yield having
    fast_dtype.cache_clear()


@pytest.mark.parametrize(("instructions", "dtype"), [
    (("avx2", "avx512f", "avx512_bf16"), torch.bfloat16), (("amx_tile", "amx_bf16"), torch.bfloat16),
    (("asimd", "bf16"), torch.bfloat16), (("avx2", "avx512f"), torch.float32), ((), torch.float32),
])  # fmt: skip
def test_auto_is_bfloat16_where_the_processor_multiplies_in_it(
    instructions: Any, dtype: torch.dtype, processor: Any, base_folder: Path
) -> None:
    assert processor(*instructions) == dtype
    model, _ = load_base(str(base_folder))
    assert model.dtype == dtype


def test_a_gpu_that_only_emulates_it_gets_float32(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    processor("avx512_bf16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for real, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, real=real: real)
        fast_dtype.cache_clear()
        assert fast_dtype() == dtype


def test_this_processors_instructions_can_be_read() -> None:
    found = load._instructions()
    assert not Path("/proc/cpuinfo").exists() or {"fpu", "asimd"} & found


def test_stored_named_and_given_dtypes(base_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_base(str(base_folder), "bfloat16")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for dtype, is_ in (("stored", torch.bfloat16), ("float32", torch.float32), (torch.float16, torch.float16)):
        assert load_base(str(tmp_path), dtype)[0].dtype == is_


@pytest.mark.parametrize("dtype", ["float99", "int8", "nn", ""])
def test_another_dtype_is_refused(dtype: str, base_folder: Path) -> None:
    with pytest.raises(ValueError, match=f"dtype='{dtype}': choose auto, stored, float32, bfloat16 or float16"):
        load_base(str(base_folder), dtype)


@pytest.mark.parametrize(("method", "module", "line"), [
    ("gptq", "gptqmodel", "pip install optimum gptqmodel"), ("awq", "gptqmodel", "pip install gptqmodel"),
    ("compressed-tensors", "compressed_tensors", "pip install 'compressed-tensors>=0.15'"),
    ("hqq", "hqq", "pip install hqq"), ("auto-round", "auto_round", "pip install 'auto-round>=0.5'"),
])  # fmt: skip
def test_a_stored_model_names_what_it_needs_before_weights_are_read(
    method: str, module: str, line: str, base_folder: Path, tmp_path: Path
) -> None:
    if find_spec(module) is not None:
        pytest.skip(f"{module} is installed")
    folder = Path(shutil.copytree(base_folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ImportError, match=rf"a model in {method} needs the package \S+ \(.*\): ") as told:
        load_base(str(folder))
    assert str(told.value).endswith(line) and "\n" not in str(told.value)


def test_what_their_kernels_were_made_for_is_kept() -> None:
    assert load._dtype("auto", "gptq") == load._dtype("auto", "awq") == "auto"
    assert load._dtype("auto", "bitsandbytes") == fast_dtype()


def test_an_unknown_method_is_left_to_transformers() -> None:
    quantised.check_installed("fine-new-method")


def stored_with(base_folder: Path, folder: Path, pad: str | None, eos: str | None) -> Path:
    """A copy of the base whose tokenizer names these; words it does not hold get ids beyond the embeddings."""
    shutil.copytree(base_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({name: word for name, word in (("pad_token", pad), ("eos_token", eos)) if word})
    tokenizer.save_pretrained(folder)
    return folder


def test_a_pad_token_without_an_embedding_is_eos_instead(base_folder: Path, tmp_path: Path) -> None:
    _, own = load_base(str(base_folder), "float32")
    base, tokenizer = load_base(str(stored_with(base_folder, tmp_path / "base", "[PAD]", None)), "float32")
    assert len(tokenizer) > len(base.get_input_embeddings().weight), "the token has an embedding: nothing is shown"
    assert tokenizer.pad_token_id == own.eos_token_id
    batch = tokenizer(["a", "a longer text"], padding=True, return_tensors="pt")
    assert torch.isfinite(base(**batch).logits).all()


def test_pad_and_eos_without_embeddings_are_refused(base_folder: Path, tmp_path: Path) -> None:
    folder = stored_with(base_folder, tmp_path / "base", "[PAD]", "[END]")
    with pytest.raises(ValueError, match=r"pads with '\[PAD\]', id \d+, but the model has \d+ embeddings: set"):
        load_base(str(folder), "float32")
