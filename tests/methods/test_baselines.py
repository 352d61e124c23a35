"""What LoRA is matched to, and that settings can be chosen without a look at the test split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from smartmops.base import load_base
from smartmops.data.tasks import splits
from smartmops.flow.trainer import TrainConfig, train
from smartmops.methods.baselines import MethodConfig, build, matched, trained_numbers

SMALL = {"experts": 2, "prompts_per_expert": 6, "gate_hidden_size": 8}


def kept_bytes(model: Any) -> int:
    """Of distinct tensors that one step keeps for its backward pass, parameters not counted."""
    torch.manual_seed(0)
    ids = torch.randint(5, 40, (4, 48))
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss.backward()
    return sum(kept.values())


def test_lora_is_matched_in_trained_numbers_up_to_half_a_rank(base_folder: Path) -> None:
    base, _ = load_base(str(base_folder), "float32")
    wanted = trained_numbers(build(base, MethodConfig(**SMALL)))
    for match in ("parameters", "memory"):
        config = MethodConfig(method="lora", lora_match=match, lora_rank=1, **SMALL)
        base, _ = load_base(str(base_folder), "float32")
        own = matched(base, config)
        found = trained_numbers(build(base, config))
        assert abs(found - wanted) <= found / own.lora_rank / 2
        assert own.lora_from == (1 if match == "memory" else 0)  # 9/32 of 4 layers


@pytest.mark.parametrize("kind", ["hidden_states", "keys_values"])
@pytest.mark.parametrize(("first", "frozen"), [(True, None), (False, ["expert 1"]), (True, ["expert 1"])])
def test_numbers_that_no_gradient_reaches_are_not_trained(
    base_folder: Path, kind: str, first: bool, frozen: list[str] | None
) -> None:
    base, _ = load_base(str(base_folder), "float32")
    model = build(base, MethodConfig(expert_kind=kind, freeze_first_column=first, init="random", **SMALL))
    model.base_model.layer().configs["default"].frozen_experts = frozen
    ids = torch.randint(5, 40, (32, 24))
    labels = ids.clone()
    labels[:, :12] = -100  # an instruction, which the gate reads
    for value in model.parameters():
        if value.requires_grad:
            value.data.add_(torch.randn_like(value) * 0.1)  # values that start at zero pass no gradient to others
    model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
    reached = sum(int((value.grad != 0).sum()) for value in model.parameters() if value.grad is not None)
    assert reached == trained_numbers(model)


def test_a_gate_over_one_expert_is_not_trained(base_folder: Path) -> None:
    base, _ = load_base(str(base_folder), "float32")
    config = MethodConfig(method="prompt-tuning", expert_kind="hidden_states", **SMALL)
    assert trained_numbers(build(base, config)) == 2 * 6 * 32


def test_lora_matched_in_memory_goes_no_deeper_than_mops(base_folder: Path) -> None:
    kept = {}
    for name, config in {
        "mops": MethodConfig(**SMALL),
        "memory": MethodConfig(method="lora", lora_match="memory", **SMALL),
        "parameters": MethodConfig(method="lora", lora_match="parameters", **SMALL),
    }.items():
        kept[name] = kept_bytes(build(load_base(str(base_folder), "float32")[0], config).train())
    assert kept["memory"] < kept["parameters"]
    assert kept["memory"] == pytest.approx(kept["mops"], rel=0.35)


SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, vocab_size=300,
             pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
TARGETS = {  # what PEFT knows by itself, or the same parts under other names
    "llama": ({"q_proj", "v_proj"}, {"k_proj", "v_proj", "down_proj"}),
    "gpt_neox": ({"query_key_value"}, {"query_key_value", "dense_4h_to_h"}),
    "gpt2": ({"c_attn"}, {"c_attn", "mlp.c_proj"}),
    "phi3": ({"qkv_proj"}, {"qkv_proj", "down_proj"}),
    "opt": ({"q_proj", "v_proj"}, {"q_proj", "k_proj", "fc2"}),
    "gpt_bigcode": ({"c_attn"}, {"c_attn", "mlp.c_proj"}),
    "starcoder2": ({"q_proj", "v_proj"}, {"k_proj", "v_proj", "mlp.c_proj"}),
    "olmo2": ({"q_proj", "v_proj"}, {"k_proj", "v_proj", "down_proj"}),
    "deepseek_v3": ({"q_b_proj", "kv_b_proj"}, {"kv_b_proj", "down_proj"}),
}


def base_like(kind: str) -> Any:
    narrow = dict(num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
                  moe_intermediate_size=16, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8,
                  v_head_dim=8) if kind == "deepseek_v3" else {}  # fmt: skip
    own = dict(word_embed_proj_dim=32, ffn_dim=48) if kind == "opt" else narrow
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE | own))


@pytest.mark.parametrize("method", ["lora", "ia3"])
@pytest.mark.parametrize("kind", TARGETS)
def test_baselines_adapt_the_architectures_own_parts(kind: str, method: str) -> None:
    model = build(base_like(kind), MethodConfig(method=method, **SMALL))
    assert set(model.peft_config["default"].target_modules) == TARGETS[kind][method == "ia3"]
    ids = torch.arange(5, 15)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "phi3", "opt"])
def test_lora_is_matched_on_other_architectures(kind: str) -> None:
    wanted = trained_numbers(build(base_like(kind), MethodConfig(**SMALL)))
    config = MethodConfig(method="lora", lora_match="parameters", **SMALL)
    rank = matched(base_like(kind), config).lora_rank
    found = trained_numbers(build(base_like(kind), config))
    assert abs(found - wanted) <= max(found / rank / 2, found - wanted if rank == 1 else 0)


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_model_without_the_modules_is_refused(method: str) -> None:
    kind = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=300)
    with pytest.raises(ValueError, match=rf"--method {method}: MambaForCausalLM has none of the modules.*choose mops"):
        build(AutoModelForCausalLM.from_config(kind), MethodConfig(method=method))


def test_validation_holds_out_a_part_of_the_training_split_and_never_the_test(two_tasks: Path) -> None:
    train_part, test = splits(two_tasks)
    fitted, validation = splits(two_tasks, validation=True)
    assert sorted(map(repr, [*fitted, *validation])) == sorted(map(repr, train_part))
    assert not {*map(repr, validation)} & {*map(repr, test)} and validation


def test_a_validated_run_counts_the_smaller_splits(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    counts = [
        train(config(validation=on, out=tmp_path / str(on), steps=2, samples_per_task=0))["examples"]
        for on in (False, True)
    ]
    assert counts == [{"train": 36, "validation": 0, "test": 4}, {"train": 32, "validation": 0, "test": 4}]
