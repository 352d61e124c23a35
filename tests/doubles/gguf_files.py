"""Tiny GGUF files, written by the format's own library: a Llama of two layers with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

import gguf

WIDTH, INNER, LAYERS, HEADS = 32, 64, 2, 2
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tokens() -> list[str]:
    return [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "Ġ1"]


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Named as a GGUF names them; keys and queries as `llama.cpp` stores them."""
    draw = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return draw.normal(0, 0.3, shape).astype(np.float32)

    found = {"token_embd.weight": normal(len(tokens()), WIDTH), "output_norm.weight": np.ones(WIDTH, np.float32)}
    for i in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            found[f"blk.{i}.{name}.weight"] = normal(WIDTH, WIDTH)
        found |= {f"blk.{i}.ffn_gate.weight": normal(INNER, WIDTH), f"blk.{i}.ffn_up.weight": normal(INNER, WIDTH),
                  f"blk.{i}.ffn_down.weight": normal(WIDTH, INNER)}  # fmt: skip
        found |= {f"blk.{i}.{name}.weight": np.ones(WIDTH, np.float32) for name in ("attn_norm", "ffn_norm")}
    return found


def write(file: Path, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q4_1, **changes: Any) -> Path:
    """Write a GGUF; `changes`: architecture, tokenizer (its model's name), parts, ends (id of the end of turn), pre."""
    writer = gguf.GGUFWriter(file, changes.get("architecture", "llama"))
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens()))
    writer.add_tokenizer_model(changes.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(changes.get("pre", "gpt-2"))
    writer.add_token_list(tokens())
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens()) - len(SPECIAL)))
    writer.add_token_merges(["h e", "l l", "Ġ 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    if "ends" in changes:
        writer.add_eot_token_id(changes["ends"])
    if "parts" in changes:
        writer.add_uint16("split.count", changes["parts"])
    for name, value in weights().items():
        plain = kind == gguf.GGMLQuantizationType.F32 or value.ndim == 1
        stored = value if plain else gguf.quantize(value, kind)
        writer.add_tensor(name, stored, raw_dtype=None if plain else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
