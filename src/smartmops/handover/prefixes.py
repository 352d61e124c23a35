"""A pinned expert's columns into files: an adapter of PEFT's, or safetensors with keys and values.

Knows the two layouts. Knows no gate, no run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PrefixTuningConfig
from safetensors.torch import save_file

from smartmops.checks.errors import MissingExtra, RunError

from .columns import Columns, moved


def write_peft(folder: Path, kind: str, layers: Mapping[int, Columns], backbone: Any, base: str) -> int:
    """Write an adapter that plain PEFT loads; returns its number of virtual tokens.

    PEFT keeps one row for each virtual token: key and value of the first layer, of the second, and so on. It puts the
    text behind them, at position V, so keys are moved by that.

    Raises:
        ValueError: layers differ in their columns or widths, or a key cannot be moved.
        ImportError: this PEFT has no such method.
    """
    alike = {number: columns.repeated() for number, columns in layers.items()}
    count = backbone.config.get_text_config().num_hidden_layers
    shapes = {tuple(each.keys.shape) for each in alike.values()} | {tuple(e.values.shape) for e in alike.values()}
    if sorted(alike) != list(range(count)) or len(shapes) != 1:
        raise RunError("PEFT's prefix has as many columns, key heads and widths in each layer, and these layers "
                         "differ: choose --format kv")  # fmt: skip
    ((virtual, heads, width),) = shapes
    pairs = [each for number in range(count)
             for each in (moved(backbone, number, alike[number].keys, virtual), alike[number].values)]  # fmt: skip
    config = _peft_config(kind, num_virtual_tokens=virtual, num_layers=count, token_dim=heads * width,
                          num_attention_heads=heads, task_type="CAUSAL_LM", inference_mode=True,
                          base_model_name_or_path=base)  # fmt: skip
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    flat = torch.stack(pairs, 1).reshape(virtual, -1).contiguous()
    save_file({"prompt_embeddings": flat}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return int(virtual)


def _peft_config(kind: str, **options: Any) -> PeftConfig:
    if kind == "peft-prefix":
        return PrefixTuningConfig(**options)
    try:
        from peft import CartridgeConfig
    except ImportError as error:
        raise MissingExtra("this PEFT has no CARTRIDGE: pip install -U peft, or choose --format peft-prefix") from error
    return CartridgeConfig(num_frozen_tokens=0, **options)


def write_plain(file: Path, layers: Mapping[int, Columns], about: Mapping[str, Any]) -> int:
    """Write keys, values and log weights of each layer; returns the most columns of a layer, copies not counted."""
    tensors = {f"layers.{number}.{name}": getattr(columns, name).contiguous()
               for number, columns in layers.items() for name in ("keys", "values", "log_weights")}  # fmt: skip
    save_file(tensors, file, metadata={"format": "pt", "about": json.dumps(dict(about), ensure_ascii=False)})
    return max(len(columns.keys) for columns in layers.values())
