"""GGUF files as plain model folders: checked, dequantised once, with their tokenizer, chat template and end of turn."""

from __future__ import annotations

import struct
from collections import Counter
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import gguf
from gguf import GGMLQuantizationType as Kind
from smartmops.checks.errors import BaseModelError
from smartmops.progress.bars import console

from . import header as gguf_header
from .cache import cache, once

KEPT = {Kind.F32: torch.float32, Kind.F16: torch.float16}  # all else becomes bfloat16, finer than its own grid
WAY_OUT = "give the folder of the model that it was made from"
FORMAT = 2  # of converted folders; a new one makes older ones stale


def folder_of(file: Path) -> Path:
    """The plain model folder of a GGUF, made the first time it is asked for and kept in the cache.

    A file is known by its name, size and time of change, so a moved one is not converted again.

    Raises:
        BaseModelError: it is damaged, or of an architecture, quantisation or tokenizer that cannot be read.
        DiskError: the cache cannot be written, or the disk is too full.
    """
    about = file.stat()
    known = blake2b(f"{FORMAT} {file.name} {about.st_size} {about.st_mtime_ns}".encode(), digest_size=6).hexdigest()
    folder = cache() / "gguf" / f"{file.stem}-{known}"
    if folder.is_dir():
        return folder
    reader = check(file)
    elements = sum(int(tensor.n_elements) for tensor in reader.tensors)
    console.print(f"converting {file.name} ({elements / 1e6:.0f} M weights) once, into {folder}")
    return once(folder, lambda unfinished: convert(file, unfinished, reader), 4 * elements)


def check(file: Path) -> Any:
    """The reader of a GGUF that can be converted, as far as its header tells.

    Raises:
        BaseModelError: it is damaged, a part of a model, or of an architecture or quantisation that cannot be read.
    """
    reader = _reader(file)
    kinds = {Kind(tensor.tensor_type) for tensor in reader.tensors}
    for kind in sorted(kinds - {Kind.F32, Kind.F16, Kind.BF16}):
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except (NotImplementedError, KeyError) as error:
            raise BaseModelError(
                f"{file.name} is quantised as {kind.name}, which gguf {_version()} cannot unpack: {WAY_OUT}, or a GGUF "
                "in Q4_K_M or Q8_0"
            ) from error
    parts = _value(reader, "split.count")
    if parts and int(parts) > 1:
        raise BaseModelError(
            f"{file.name} is one of {parts} parts: join them with llama-gguf-split --merge, or {WAY_OUT}"
        )
    architecture = str(_value(reader, "general.architecture"))
    blocks = _value(reader, f"{architecture}.block_count")
    if isinstance(blocks, int) and blocks > len(reader.tensors):
        raise BaseModelError(f"{file.name} counts {blocks} layers, but holds {len(reader.tensors)} tensors, so it is "
                             "damaged: fetch it again")  # fmt: skip
    _config(file, architecture)
    return reader


def convert(file: Path, folder: Path, reader: Any = None) -> None:
    """Write a GGUF as a plain model folder: config, dequantised weights, tokenizer, chat template, end of turn.

    Weights that are mostly float32 or float16 stay so; quantised ones become bfloat16.

    Raises:
        BaseModelError: it is damaged, or its tokenizer cannot be read.
    """
    reader = reader or _reader(file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # of whatever kind: converters of tokenizers raise what they meet
        raise BaseModelError(f"the tokenizer in {file.name} cannot be read ({_line(error)}): {WAY_OUT}") from error
    if _value(reader, "tokenizer.ggml.pre") == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = _digits_apart()
    counts: Counter[Kind] = Counter()
    for tensor in reader.tensors:
        counts[Kind(tensor.tensor_type)] += int(tensor.n_elements)
    _fits(file, sum(counts.values()))
    model = _plain(file, KEPT.get(counts.most_common(1)[0][0], torch.bfloat16))
    ends = {tokenizer.eos_token_id, _value(reader, "tokenizer.ggml.eot_token_id")} - {None}
    if ends:
        model.generation_config.eos_token_id = sorted(int(end) for end in ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _fits(file: Path, elements: int) -> None:
    """Whether a model of this config is about as large as the weights of the file, before it is made."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(file.parent, gguf_file=file.name))
    asked = sum(parameter.numel() for parameter in model.parameters())
    if asked > 2 * elements:
        raise BaseModelError(f"{file.name} holds {elements:,} weights, but its header describes a model of {asked:,}, "
                             f"so it is damaged: fetch it again, or {WAY_OUT}")  # fmt: skip


def _plain(file: Path, dtype: torch.dtype) -> Any:
    """The model with dequantised weights and no trace of where they came from."""
    options: dict[str, Any] = {"gguf_file": file.name, "dtype": dtype}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, **options)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = {name: _cast(value, dtype) for name, value in loaded.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.config.dtype, model.config._name_or_path = dtype, file.stem
    model.generation_config = loaded.generation_config
    return model


def _digits_apart() -> Any:
    """How SmolLM's tokenizer splits text before merging; transformers reads every GGUF's as GPT-2's."""
    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _reader(file: Path) -> Any:
    try:
        gguf_header.walk(file)
        return gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError, TypeError, AttributeError, struct.error) as error:
        raise BaseModelError(
            f"{file} ({file.stat().st_size} bytes) is no whole GGUF that gguf {_version()} can read ({_line(error)}): "
            "fetch it again, or pip install --upgrade gguf"
        ) from error


def _config(file: Path, architecture: str) -> None:
    """Its config, as a check that transformers knows the architecture, as a causal language model."""
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise BaseModelError(f"{type(config).__name__} is no causal language model")
    except Exception as error:  # of whatever kind: configs raise what they meet
        raise BaseModelError(
            f"{file.name} is of the architecture {architecture!r}, which transformers {transformers.__version__} "
            f"cannot read from a GGUF ({_line(error)}): {WAY_OUT}"
        ) from error


def _value(reader: Any, key: str) -> Any:
    field = reader.fields.get(key)
    return None if field is None else field.contents()


def _version() -> str:
    from importlib.metadata import version

    return version("gguf")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
