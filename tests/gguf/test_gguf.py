"""GGUF files as models: the same numbers as their weights unpacked, converted once, and refused in one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import gguf as library
from gguf import GGMLQuantizationType as Kind
from gguf_files import LAYERS, TEMPLATE, tokens, weights, write
from smartmops.base import describe, load_base, local
from smartmops.gguf import conversion as ours


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "model.gguf")


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that is converted."""
    seen: list[Path] = []
    convert = ours.convert
    monkeypatch.setattr(ours, "convert", lambda file, *rest: (seen.append(file), convert(file, *rest))[1])
    return seen


@pytest.mark.parametrize(("kind", "dtype"), [
    (Kind.Q4_1, torch.bfloat16), (Kind.Q8_0, torch.bfloat16), (Kind.F16, torch.float16), (Kind.F32, torch.float32),
], ids=lambda value: getattr(value, "name", str(value)))  # fmt: skip
def test_weights_are_those_of_the_file_in_the_dtype_that_is_fine_enough(kind: Kind, dtype: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", kind)
    model, _ = load_base(str(file), "stored")
    assert model.dtype == dtype and not hasattr(model.config, "quantization_config")
    for name, own in {"mlp.down_proj": "ffn_down", "self_attn.v_proj": "attn_v"}.items():
        for i in range(LAYERS):
            value = weights()[f"blk.{i}.{own}.weight"]
            unpacked = value if kind == Kind.F32 else library.dequantize(library.quantize(value, kind), kind)
            got = model.get_submodule(f"model.layers.{i}.{name}").weight
            assert torch.equal(got, torch.tensor(unpacked).to(dtype)), name


def test_the_tokenizer_its_chat_template_and_the_end_of_turn_come_along(tmp_path: Path) -> None:
    model, tokenizer = load_base(str(write(tmp_path / "model.gguf", ends=0)), "float32")
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokens())))) == tokens()
    assert tokenizer.chat_template == TEMPLATE
    assert model.generation_config.eos_token_id == [0, 2]
    ids = tokenizer("hello 12<|im_end|>")["input_ids"]
    assert tokenizer.decode(ids) == "hello 12<|im_end|>"
    assert tokenizer.convert_ids_to_tokens(ids) == ["he", "ll", "o", "Ġ1", "2", "<|im_end|>"]  # no <bos> of its own


def test_smollm_keeps_digits_apart(tmp_path: Path) -> None:
    _, tokenizer = load_base(str(write(tmp_path / "model.gguf", pre="smollm")), "float32")
    assert tokenizer.convert_ids_to_tokens(tokenizer("o 12")["input_ids"]) == ["o", "Ġ", "1", "2"]


def test_a_file_and_its_folder_are_the_same_model_converted_once(file: Path, conversions: list[Path]) -> None:
    folder = local(str(file))
    assert local(str(file.parent)) == folder and conversions == [file]
    assert describe(str(file)) == describe(str(file.parent))
    moved = file.with_name("elsewhere")
    moved.mkdir()
    assert local(str(file.rename(moved / file.name))) == folder and conversions == [file]


def test_a_changed_file_is_another_model(file: Path, conversions: list[Path]) -> None:
    folder = local(str(file))
    os.utime(file, ns=(1, 1))
    assert local(str(file)) != folder and len(conversions) == 2


def test_a_model_folder_that_also_has_a_gguf_is_itself(base_folder: Path, tmp_path: Path) -> None:
    for each in base_folder.iterdir():
        (tmp_path / each.name).write_bytes(each.read_bytes())
    write(tmp_path / "model.gguf")
    assert local(str(tmp_path)) == str(tmp_path)


def test_several_files_in_a_folder_are_refused(file: Path) -> None:
    write(file.with_name("other.gguf"))
    with pytest.raises(ValueError, match=r"holds 2 GGUF files \(model.gguf, other.gguf\), but one is a model: name"):
        local(str(file.parent))


def test_one_of_several_parts_is_refused(tmp_path: Path, conversions: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"part.gguf is one of 3 parts: join them"):
        local(str(write(tmp_path / "part.gguf", parts=3)))
    assert not conversions


@pytest.mark.parametrize("architecture", ["nosuch", "t5"])
def test_an_architecture_that_is_no_causal_model_of_transformers_is_refused(
    architecture: str, tmp_path: Path, conversions: list[Path]
) -> None:
    with pytest.raises(
        ValueError, match=rf"is of the architecture '{architecture}', which transformers \S+ cannot"
    ) as e:
        local(str(write(tmp_path / "model.gguf", architecture=architecture)))
    assert "give the folder of the model" in str(e.value) and "\n" not in str(e.value) and not conversions


def test_a_quantisation_that_nothing_unpacks_is_refused(
    file: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(data: Any, kind: Kind) -> Any:
        raise NotImplementedError(f"Dequantization for {kind.name} is not yet implemented")

    monkeypatch.setattr(library, "dequantize", unknown)
    with pytest.raises(
        ValueError, match=r"model.gguf is quantised as Q4_1, which gguf \S+ cannot unpack: give the fold"
    ):
        local(str(file))
    assert not conversions


def test_an_unknown_tokenizer_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the tokenizer in model.gguf cannot be read"):
        local(str(write(tmp_path / "model.gguf", tokenizer="nosuch")))


@pytest.mark.parametrize("keep", [0, 3, 100])
def test_a_damaged_file_is_refused(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"model.gguf \({keep} bytes\) is no whole GGUF") as told:
        local(str(file))
    assert "\n" not in str(told.value)


def test_a_file_cut_in_its_weights_is_refused(file: Path) -> None:
    size = file.stat().st_size
    os.truncate(file, size - 1000)
    with pytest.raises(ValueError, match=r"is no whole GGUF"):
        local(str(file))
