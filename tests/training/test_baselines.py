"""What LoRA is matched to, and that settings can be chosen without a look at the test split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from smartmops.base import load_base
from smartmops.data.tasks import splits
from smartmops.training.baselines import MethodConfig, build, matched
from smartmops.training.trainer import TrainConfig, train

SMALL = {"experts": 2, "prompts_per_expert": 6, "gate_hidden_size": 8}


def trained_numbers(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


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


def test_a_model_without_the_modules_is_refused() -> None:
    class Bare(torch.nn.Module):
        class config:
            hidden_size, num_hidden_layers = 8, 2

    with pytest.raises(ValueError, match="none: choose lora_rank"):
        matched(Bare(), MethodConfig(method="lora", lora_match="parameters"))


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
