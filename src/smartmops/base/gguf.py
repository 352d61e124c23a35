"""GGUF files as plain model folders: dequantised once, with tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def convert(file: Path, folder: Path) -> None:
    """Write the GGUF `file` as a plain model folder, dequantised: config, weights, tokenizer, chat template.

    Weights become bfloat16, except where the file has them in float32 or float16, which stay.
    """
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    dtype = torch.bfloat16
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    weights = {name: value.to(dtype) if value.is_floating_point() else value
               for name, value in loaded.state_dict().items()}  # fmt: skip
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.config.dtype = dtype
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
