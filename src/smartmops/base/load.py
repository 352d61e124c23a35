"""A model folder or hub id in, a frozen model out: plain, pruned, int8 or 4-bit. Its gradient is checked once, here.

Knows quantising libraries by what they do, not by name. Knows no text and no adapters.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from smartmops.tuner.engine import keep_unpacked

from .builtin import BUILT_IN
from .gradient import check_gradient

Quantisation = Literal["int8", "int8-torchao", "nf4"]


def load_base(model: str, dtype: torch.dtype | str = torch.float32, quantisation: Quantisation | None = None) -> Any:
    """Frozen model in eval mode, on the GPU if there is one, and its tokenizer.

    A quantised one has passed `check_gradient`.

    Args:
        model: A local folder, a hub id, or `tiny`.
        dtype: Of all that is not quantised; `auto`: as stored. What was stored quantised keeps its dtype.
        quantisation: Quantise on the way in: `int8` is LLM.int8(), `nf4` 4-bit NormalFloat (both bitsandbytes),
            `int8-torchao` weight-only int8. None: as stored.

    Raises:
        FileNotFoundError: `model` looks like a path, and there is nothing.
        ImportError: the quantising library is missing; the message has its `pip install` line.
        ValueError: gradients do not pass through the quantised model as they should.
    """
    name = local(model)
    kind = quantisation or quantised_as(model)
    options: dict[str, Any] = {"dtype": dtype}
    if kind is not None:
        _installed(kind)
        options |= {"device_map": {"": torch.cuda.current_device()} if torch.cuda.is_available() else "cpu"}
    if quantisation is not None:
        options["quantization_config"] = _config(quantisation, dtype)
    base = AutoModelForCausalLM.from_pretrained(name, **options)
    if kind is None:
        base = base.to("cuda" if torch.cuda.is_available() else "cpu")
    base = base.requires_grad_(False).eval()
    if kind is not None:
        keep_unpacked(base)
        check_gradient(base)
    return base, AutoTokenizer.from_pretrained(name)


def local(model: str) -> str:
    """The folder or hub id behind a MODEL argument.

    Raises:
        FileNotFoundError: it looks like a path, and there is nothing.
    """
    if model in BUILT_IN:
        return str(BUILT_IN[model]())
    name = model
    if (name.startswith((".", "/", "~")) or Path(name).suffix) and not Path(name).expanduser().exists():
        raise FileNotFoundError(f"MODEL {model} does not exist: give a model folder, a hub id, or tiny")
    return name


def _installed(kind: str) -> None:
    packages = {"int8": "bitsandbytes", "nf4": "bitsandbytes", "int8-torchao": "torchao"}
    package = packages.get(kind, kind)
    if package == "bitsandbytes":
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each layer and pass on casts to fp16
    if package in ("bitsandbytes", "torchao"):
        try:
            __import__(package)
        except ImportError as error:
            extra = {"bitsandbytes": "int8", "torchao": "torchao"}[package]
            raise ImportError(
                f"a model in {kind} needs the package {package} ({error}): pip install 'smartmops[{extra}]'"
            ) from error


def _config(quantisation: Quantisation, dtype: torch.dtype | str) -> Any:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if quantisation == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantisation == "nf4":
        compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def describe(model: str) -> dict[str, Any]:
    """What names a stored model exactly enough to notice another: files, their sizes and, of a local one, times."""
    folder = Path(local(model)).expanduser()
    if not folder.is_dir():
        return {"name": model}
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".json"))
    return {"name": str(folder.resolve()), "files": {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}}


def quantised_as(model: str) -> str | None:
    """`quant_method` of a stored model, None where it is not quantised."""
    stored = getattr(AutoConfig.from_pretrained(local(model)), "quantization_config", None)
    return None if stored is None else str(stored.get("quant_method"))
