"""Quantisation libraries: which one a stored model or a wish needs, and what to install for it."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoConfig

from smartmops.checks.errors import ConfigError, MissingExtra
from smartmops.options.compression import Quantisation

OURS = {"int8": "bitsandbytes", "nf4": "bitsandbytes", "int8-torchao": "torchao"}
# Importable modules, and pip's line, by `quant_method`: what the quantizers of transformers ask for.
LIBRARIES: dict[str, tuple[tuple[str, ...], str]] = {
    "bitsandbytes": (("bitsandbytes",), "'smartmops[int8]'"),
    "torchao": (("torchao",), "'smartmops[torchao]'"),
    "gptq": (("optimum", "gptqmodel"), "optimum gptqmodel"),
    "awq": (("gptqmodel",), "gptqmodel"),
    "compressed-tensors": (("compressed_tensors",), "'compressed-tensors>=0.15'"),
    "hqq": (("hqq",), "hqq"),
    "quanto": (("optimum.quanto",), "optimum-quanto"),
    "aqlm": (("aqlm",), "'aqlm[gpu,cpu]'"),
    "auto-round": (("auto_round",), "'auto-round>=0.5'"),
    "vptq": (("vptq",), "'vptq>=0.0.4'"),
    "spqr": (("spqr_quant",), "'spqr_quant[gpu]'"),
    "eetq": (("kernels",), "kernels"),
}


def check_installed(kind: str) -> None:
    """Check that what quantises as `kind` (one of `Quantisation`, or a stored `quant_method`) can be imported.

    A method that is not in the list is left to transformers, which names what it needs.

    Raises:
        MissingExtra: it cannot; the message has the `pip install` line.
    """
    method = OURS.get(kind, kind)
    modules, line = LIBRARIES.get(method, ((), ""))
    if method == "bitsandbytes":
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each layer and pass on casts to fp16
    for module in modules:
        try:
            if method in ("bitsandbytes", "torchao"):
                __import__(module)
            elif find_spec(module) is None:
                raise ImportError(f"no module named {module!r}")
        except ImportError as error:
            raise MissingExtra(
                f"a model in {kind} needs the package {module.replace('_', '-').replace('.', '-')} ({error}): "
                f"pip install {line}"
            ) from error


def settings(quantisation: Quantisation, dtype: torch.dtype) -> Any:
    """What `from_pretrained` takes to quantise on the way in; `dtype` is what 4-bit weights are multiplied in."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if quantisation == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantisation == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    if quantisation != "int8-torchao":
        raise ConfigError(f"quantisation={quantisation!r}: choose {', '.join(OURS)}, or None")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def stored(name: str) -> str | None:
    """`quant_method` of the model at a folder or hub id, None where it is not quantised."""
    found = getattr(AutoConfig.from_pretrained(name), "quantization_config", None)
    return None if found is None else str(found.get("quant_method"))
