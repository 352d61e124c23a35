"""A MODEL argument in, a frozen model and its tokenizer out: plain, pruned or quantised, its gradient checked once."""

from __future__ import annotations

from functools import cache as remembered
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from smartmops.checks.errors import BaseModelError, ConfigError, WrongType
from smartmops.options.compression import Quantisation
from smartmops.tuner.engine import keep_unpacked

from . import quantised
from .gradient import check_gradient
from .names import is_of_hub, local, readable

BUILT_FOR = ("gptq", "awq", "compressed-tensors")  # methods whose kernels were made for the dtype that is stored
MULTIPLIES = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}  # what Linux calls the instructions


def load_base(model: str, dtype: torch.dtype | str = "auto", quantisation: Quantisation | None = None) -> Any:
    """Frozen model in eval mode, on the GPU if there is one, and its tokenizer.

    A quantised one has passed `check_gradient`.

    Args:
        model: A folder, a `*.gguf` file, a hub id, `smollm2` or `tiny`.
        dtype: Of all that is not quantised. `auto`: `fast_dtype()`, except that GPTQ, AWQ and compressed tensors keep
            what is stored; `stored`: as stored.
        quantisation: Quantise on the way in: `int8` is LLM.int8(), `nf4` 4-bit NormalFloat (both bitsandbytes),
            `int8-torchao` weight-only int8. None: as stored.

    Raises:
        BaseModelNotFound: there is no model of that name.
        MissingExtra: the quantising library is missing; the message has its `pip install` line.
        BaseModelUnreachable: the model can neither be found nor fetched.
        BaseModelError: it is no model, or gradients do not pass through the quantised one as they should.
    """
    if not isinstance(model, str | Path):
        raise WrongType(f"model={model!r}: give a folder, a *.gguf file, a hub id, smollm2 or tiny")
    model = str(model)
    name = local(model)
    with readable(model):
        kind = quantisation or quantised.stored(name)
    numbers = _dtype(dtype, kind)
    options: dict[str, Any] = {"dtype": numbers}
    if kind is not None:
        quantised.check_installed(kind)
        options |= {"device_map": {"": torch.cuda.current_device()} if torch.cuda.is_available() else "cpu"}
    if quantisation is not None:
        compute = numbers if isinstance(numbers, torch.dtype) else torch.bfloat16
        options["quantization_config"] = quantised.settings(quantisation, compute)
    with readable(model):
        base = AutoModelForCausalLM.from_pretrained(name, **options)
        tokenizer = AutoTokenizer.from_pretrained(name)
    if kind is None:
        base = base.to("cuda" if torch.cuda.is_available() else "cpu")
    base = base.requires_grad_(False).eval()
    if is_of_hub(model):
        base.name_or_path = base.config._name_or_path = model  # not the snapshot's folder: adapters name their base
    if kind is not None:
        keep_unpacked(base)
        check_gradient(base)
    return base, _padded(tokenizer, base)


def _padded(tokenizer: Any, base: Any) -> Any:
    """With EOS for padding where the tokenizer's own has no row in the embeddings: mask and labels hide which it is."""
    table = base.get_input_embeddings().weight
    rows = base.config.get_text_config().vocab_size if table.dim() < 2 else max(len(table), 1)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id < rows:
        return tokenizer
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id >= rows:
        raise BaseModelError(
            f"the tokenizer pads with {tokenizer.pad_token!r}, id {tokenizer.pad_token_id}, but the "
            f"model has {rows} embeddings: set a pad_token below that, or resize the embeddings"
        )
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _dtype(dtype: torch.dtype | str, kind: str | None) -> torch.dtype | str:
    """As transformers takes it, where `auto` means as stored."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "stored" or (dtype == "auto" and kind in BUILT_FOR):
        return "auto"
    if dtype == "auto":
        return fast_dtype()
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype={dtype!r}: choose auto, stored, float32, bfloat16 or float16")
    return found


@remembered
def fast_dtype() -> torch.dtype:
    """bfloat16 where the GPU, or without one the processor, multiplies in it; else float32.

    A processor without such instructions converts every product, so bfloat16 would be slower there.
    """
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    fast: bool = torch.backends.mkldnn.is_available() and bool(_instructions() & MULTIPLIES)  # type: ignore[no-untyped-call]
    return torch.bfloat16 if fast else torch.float32


def _instructions() -> set[str]:
    """What the processor can do, as /proc/cpuinfo lists it; elsewhere what torch says of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        ask = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return {"avx512_bf16"} if ask is not None and ask() else set()
    return {word for line in lines if line.startswith(("flags", "Features")) for word in line.split()}


def describe(model: str) -> dict[str, Any]:
    """What names a stored model exactly enough to notice another: files, their sizes and, of a local one, times."""
    name = local(model)
    if is_of_hub(model):
        return {"name": model}
    folder = Path(name)
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".json"))
    return {"name": str(folder.resolve()), "files": {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}}


def quantised_as(model: str) -> str | None:
    """`quant_method` of a stored model, None where it is not quantised."""
    with readable(model):
        return quantised.stored(local(model))
