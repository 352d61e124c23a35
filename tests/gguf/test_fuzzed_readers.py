"""Readers of adapters, GGUF files and messages on input that nobody meant (`fuzzing.py` has the strategies)."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

import fuzzing
from gguf_files import write
from smartmops.adapter import fresh
from smartmops.clients.messages import VERSION, unpack
from smartmops.gguf.conversion import check, convert

ROOM = 2**31  # bytes of addresses beside those that the test has already


@pytest.fixture(scope="module", autouse=True)
def _bounded() -> Any:
    """Memory has a limit while this file runs."""
    fuzzing.adapter("hidden_states")
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("reader", fuzzing.READERS)
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_nobody_meant_is_read_or_refused_in_one_line(reader: str, data: Any, tmp_path_factory: Any) -> None:
    strategy, read = fuzzing.READERS[reader]
    read(tmp_path_factory.mktemp("fuzzed"), data.draw(strategy))


@pytest.mark.parametrize("reader", ["adapter_config.json", "GGUF", "federated messages"])
def test_what_is_whole_is_taken(reader: str, tmp_path: Path) -> None:
    whole: dict[str, Any] = {
        "adapter_config.json": ("keys_values", fuzzing.adapter("keys_values")[0]),
        "federated messages": fuzzing.pack(fuzzing.Reply(**fuzzing.WORDS["Reply"], arrays=fuzzing.SENT)),
        "GGUF": fuzzing.gguf_file(),
    }
    assert fuzzing.READERS[reader][1](tmp_path, whole[reader])


HUGE = [("num_experts", 2**40), ("prompts_per_expert", 2**40), ("gate_hidden_size", 2**40), ("shared_prompts", 2**40),
        ("num_recovery_prompts", 2**40), ("embedding_size", 2**40), ("key_value_shape", [2**20, 2**20, 8, 8])]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), HUGE)
@pytest.mark.parametrize("experts", ["hidden_states", "keys_values"])
def test_a_config_that_asks_for_more_than_the_file_holds(
    name: str, value: Any, experts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused by the file's header, before anything is made."""
    monkeypatch.setattr(fresh, "parameters", lambda *_: pytest.fail("parameters were made"))
    config = fuzzing.adapter(experts)[0] | {name: value}
    if name != "key_value_shape" or experts == "keys_values":  # else it is not read
        assert not fuzzing.fuzz_config(tmp_path, (experts, config))


def test_a_gguf_whose_header_describes_a_larger_model(tmp_path: Path) -> None:
    file = write(tmp_path / "wide.gguf")
    content = file.read_bytes()
    at = content.index(b"llama.feed_forward_length") + len(b"llama.feed_forward_length") + 4
    file.write_bytes(content[:at] + (2**30).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(ValueError, match=r"wide\.gguf holds .* weights, but its header describes a model of"):
        convert(file, tmp_path / "out")


def test_a_gguf_that_counts_more_layers_than_tensors(tmp_path: Path) -> None:
    content = fuzzing.gguf_file()
    at = content.index(b"llama.block_count") + len(b"llama.block_count") + 4
    (tmp_path / "deep.gguf").write_bytes(content[:at] + (2**31).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(ValueError, match=r"deep\.gguf counts 2147483648 layers, but holds 2 tensors"):
        check(tmp_path / "deep.gguf")


@pytest.mark.parametrize("count", [2**60, 2**63])
def test_a_gguf_whose_list_counts_for_ever(count: int, tmp_path: Path) -> None:
    content = fuzzing.gguf_file()
    at = content.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    file = tmp_path / "long.gguf"
    file.write_bytes(content[:at] + count.to_bytes(8, "little") + content[at + 8 :])
    with pytest.raises(ValueError, match=rf"long\.gguf.*counts {count} values"):
        check(file)


def test_a_job_without_its_local_part_is_refused() -> None:
    words = {name: value for name, value in fuzzing.WORDS["Job"].items() if name != "local"}
    header = {"kind": "Job", "version": VERSION, "words": words}
    with pytest.raises(ValueError, match="a Job does not have the fields"):
        unpack(save({"a": torch.zeros(1)}, {"message": json.dumps(header)}))
