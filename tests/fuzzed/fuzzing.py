"""Strategies for files and messages that nobody meant, and what each reader may do with them: read, or one line of ours.

Shared by the tests, which take a few examples of each, and by `scripts/fuzz`, which goes on for as long as it is told.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors.torch import load_file, save, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import gguf
from smartmops import MoPsConfig
from smartmops.clients.messages import VERSION, Failure, Hello, Job, Local, Reply, pack, unpack
from smartmops.federated.aggregation import Layout, admit
from smartmops.gguf.conversion import check as check_gguf
from smartmops.options.federation import AggregationConfig
from smartmops.runs.adapters import load_adapter

HUGE = st.sampled_from([-1, 0, 2**31, 2**53, 2**60, 2**63, 2**64 - 1, 10**30])
SCALARS = st.none() | st.booleans() | st.integers(-3, 300) | HUGE | st.floats() | st.text(max_size=6)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def one_line(error: BaseException, kinds: type | tuple[type, ...] = ValueError) -> None:
    """Our own words: a kind of error that readers promise, in one line of bounded length."""
    assert isinstance(error, kinds), repr(error)[:500]
    said = str(error)
    assert said and "\n" not in said and len(said) < 2000, said[:500]


@cache
def base() -> LlamaForCausalLM:
    """A tiny base; adapters are taken off again."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, vocab_size=32,
                                        num_attention_heads=2)).eval()  # fmt: skip


@cache
def adapter(experts: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A good adapter: its config and its tensors."""
    with tempfile.TemporaryDirectory() as folder:
        model = get_peft_model(
            base(), MoPsConfig(num_experts=2, prompts_per_expert=2, gate_hidden_size=4, experts=experts)
        )
        model.save_pretrained(folder)
        model.unload()
        file = Path(folder)
        return json.loads((file / "adapter_config.json").read_text()), load_file(file / "adapter_model.safetensors")


def loads(folder: Path, config: bytes, tensors: bytes) -> bool:
    """Put such an adapter on the base; whether it was taken."""
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(tensors)
    try:
        model = load_adapter(base(), folder)
    except (ValueError, FileNotFoundError) as error:
        base.cache_clear()  # a refusal may leave something on it
        one_line(error, (ValueError, FileNotFoundError))
        return False
    model.unload()
    return True


@st.composite
def configs(draw: Callable[..., Any]) -> tuple[str, dict[str, Any]]:
    """A good config with some values exchanged, unknown keys among them, and some left out."""
    experts = draw(st.sampled_from(["hidden_states", "keys_values"]))
    config = dict(adapter(experts)[0])
    for name in draw(st.lists(st.sampled_from(sorted(config)) | st.text(max_size=5), max_size=3)):
        if draw(st.booleans()):
            config[name] = draw(VALUES)
        else:
            config.pop(name, None)
    return experts, config


@st.composite
def tensors(draw: Callable[..., Any]) -> tuple[str, dict[str, torch.Tensor]]:
    """Good tensors, some with another shape or type, some left out, some more."""
    experts = draw(st.sampled_from(["hidden_states", "keys_values"]))
    found = dict(adapter(experts)[1])
    for name in draw(st.lists(st.sampled_from(sorted(found)), min_size=1, max_size=2, unique=True)):
        value = found.pop(name)
        what = draw(st.sampled_from(["gone", "shape", "flat", "half", "int", "bool", "nan", "renamed", "more"]))
        changed = {"shape": value[:1].clone(), "flat": value.flatten().clone(), "half": value.half(), "int": value.long(),
                   "bool": value.bool(), "nan": value * torch.nan, "renamed": value.clone(), "more": value.clone()}.get(what)  # fmt: skip
        if changed is not None:
            found[name + draw(st.text("abc.", min_size=1, max_size=3)) if what in ("renamed", "more") else name] = (
                changed
            )
        if what == "more":
            found[name] = value
    return experts, found


@st.composite
def headers(draw: Callable[..., Any]) -> bytes:
    """safetensors with a header that was changed: counted sizes, shapes, types, offsets; or cut short."""
    blob = save(adapter("hidden_states")[1])
    size = struct.unpack("<Q", blob[:8])[0]
    header, data = json.loads(blob[8 : 8 + size]), blob[8 + size :]
    if draw(st.booleans()):
        return blob[: draw(st.integers(0, len(blob)))]
    entry = header[draw(st.sampled_from(sorted(header)))]
    name = draw(st.sampled_from(["shape", "dtype", "data_offsets"]))
    entry[name] = draw(
        st.lists(HUGE | st.integers(0, 64), max_size=3)
        if name != "dtype"
        else st.sampled_from(["F64", "I8", "BF16", "F8_E4M3", "X"])
    )
    made = json.dumps(header).encode()
    counted = draw(st.sampled_from([len(made), len(made) + 1, 0, 2**60, 2**63]))
    return struct.pack("<Q", counted) + made + data


@cache
def gguf_file() -> bytes:
    """A GGUF with a few values of each kind, and two tensors."""
    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder) / "a.gguf", "llama")
        writer.add_context_length(8)
        writer.add_embedding_length(4)
        writer.add_block_count(1)
        writer.add_head_count(1)
        writer.add_token_list(["a", "b"])
        writer.add_float32("x.y", 0.5)
        writer.add_array("x.z", [1, 2, 3])
        for name in ("token_embd.weight", "output.weight"):
            writer.add_tensor(name, np.ones((2, 4), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return (Path(folder) / "a.gguf").read_bytes()


@st.composite
def ggufs(draw: Callable[..., Any]) -> bytes:
    """A GGUF cut short, with some of its header's bytes changed, or with a header of noise."""
    blob = bytearray(gguf_file())
    how = draw(st.sampled_from(["cut", "bytes", "counts", "noise"]))
    if how == "cut":
        return bytes(blob[: draw(st.integers(0, len(blob)))])
    if how == "noise":
        return b"GGUF" + struct.pack("<I", 3) + draw(st.binary(max_size=120))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(blob) - 9))
        blob[at : at + (8 if how == "counts" else 1)] = (
            struct.pack("<Q", draw(HUGE.filter(lambda n: 0 <= n < 2**64)))
            if how == "counts"
            else draw(st.binary(min_size=1, max_size=1))
        )
    return bytes(blob)


def reads_gguf(folder: Path, content: bytes) -> bool:
    """Look at such a file; whether it was taken."""
    file = folder / "fuzzed.gguf"
    file.write_bytes(content)
    try:
        check_gguf(file)
    except ValueError as error:
        one_line(error)
        return False
    return True


SENT = {"a.mops_prompts": torch.zeros(4, 3), "a.mops_gate_out": torch.zeros(2, 3)}
LOCAL = asdict(Local(steps=3, batch_size=2, prompt_lr=0.1, gate_lr=1e-3, seed=7))
WORDS: dict[str, dict[str, Any]] = {
    "Reply": dict(round=1, client=0, examples=4, loss=1.0, seconds=1.0, mass=[0.5, 0.5], experts=None, difference=False),
    "Failure": dict(round=1, client=0, reason="no"),
    "Hello": dict(name="a", examples=3, categories=["a"], base="f", versions={"torch": "2"}),
    "Job": dict(round=1, client=0, local=LOCAL, adapter={}, base="f"),
}  # fmt: skip


@st.composite
def messages(draw: Callable[..., Any]) -> bytes:
    """A message with words of other types, other arrays, another kind or version; or cut short."""
    kind = draw(st.sampled_from(sorted(WORDS)))
    words: dict[str, Any] = dict(WORDS[kind])
    for name in draw(st.lists(st.sampled_from(sorted(words)) | st.text(max_size=4), max_size=2)):
        if draw(st.booleans()):
            words[name] = draw(VALUES)
        else:
            words.pop(name, None)
    arrays = {name: value + 1 for name, value in SENT.items()}
    for name in draw(st.lists(st.sampled_from(sorted(arrays)), max_size=1)):
        made = {"gone": None, "shape": torch.ones(5), "int": arrays[name].long(), "nan": arrays[name] * torch.nan,
                "huge": torch.ones(4, 3) * 1e38}[draw(st.sampled_from(["gone", "shape", "int", "nan", "huge"]))]  # fmt: skip
        if made is None:
            del arrays[name]
        else:
            arrays[name] = made
    header: Any = {
        "kind": draw(st.just(kind) | st.text(max_size=4)),
        "version": draw(st.just(VERSION) | SCALARS),
        "words": draw(st.just(words) | VALUES),
    }
    blob = save(arrays or {"": torch.zeros(0)}, {"message": json.dumps(draw(st.just(header) | VALUES))})
    return blob[: draw(st.just(len(blob)) | st.integers(0, len(blob)))]


def is_admitted(blob: bytes) -> bool:
    """What a server does with such an answer: whether it counts. Nothing a client sends may raise."""
    try:
        message = unpack(blob)
    except ValueError as error:
        one_line(error)
    else:
        assert isinstance(message, Reply | Failure | Hello | Job)
        assert isinstance(pack(message), bytes)
    layout = Layout(2, frozenset({"a.mops_prompts"}))
    good, failures = admit([(0, blob)], SENT, {0: 1}, layout, AggregationConfig())
    assert len(good) + len(failures) == 1
    for each in failures:
        assert "\n" not in each.reason and len(each.reason) < 2000, each.reason
    assert all(torch.isfinite(value).all() for update in good for value in update.delta.values())
    return bool(good)


def fuzz_config(folder: Path, drawn: tuple[str, dict[str, Any]]) -> bool:
    experts, config = drawn
    return loads(folder, json.dumps(config).encode(), save(adapter(experts)[1]))


def fuzz_tensors(folder: Path, drawn: tuple[str, dict[str, torch.Tensor]]) -> bool:
    experts, found = drawn
    save_file(found, folder / "made.safetensors")
    return loads(folder, json.dumps(adapter(experts)[0]).encode(), (folder / "made.safetensors").read_bytes())


def fuzz_header(folder: Path, blob: bytes) -> bool:
    return loads(folder, json.dumps(adapter("hidden_states")[0]).encode(), blob)


def fuzz_words(folder: Path, content: bytes) -> bool:
    return loads(folder, content, save(adapter("hidden_states")[1]))


def fuzz_message(folder: Path, blob: bytes) -> bool:
    return is_admitted(blob)


READERS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Path, Any], bool]]] = {
    "adapter_config.json": (configs(), fuzz_config),
    "adapter_config.json, noise": (st.binary(max_size=60) | VALUES.map(lambda v: json.dumps(v).encode()), fuzz_words),
    "adapter tensors": (tensors(), fuzz_tensors),
    "safetensors header": (headers(), fuzz_header),
    "GGUF": (ggufs(), reads_gguf),
    "federated messages": (messages() | st.binary(max_size=80), fuzz_message),
}
