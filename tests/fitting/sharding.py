"""Trains tiny adapters under HF's Trainer. Run by torchrun, with the base sharded over the processes by FSDP2:

torchrun --nproc_per_node 2 sharding.py FOLDER
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import get_peft_model
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from smartmops import MoPsConfig
from smartmops.attention.packed import IGNORED
from tiny_models import VOCABULARY, build

CASES: dict[str, dict[str, Any]] = {
    "keys-values": {"adapter": {"experts": "keys_values"}},
    "keys-values-packed": {"adapter": {"experts": "keys_values", "visible_to": "answers"}, "packed": True},
    "hidden-states": {"base": {"tie_word_embeddings": True}, "arguments": {"gradient_accumulation_steps": 2}},
    "hidden-states-packed": {"packed": True},
    "hidden-states-scaled": {"adapter": {"gate_target": "hidden_states", "expert_attention": "causal"}},
    "checkpointed": {"adapter": {"num_recovery_prompts": 2}, "arguments": {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}},
}  # fmt: skip
STEPS, BATCH, LENGTH, QUESTION = 3, 4, 12, 7
KEPT = "keys-values"  # the case that is saved halfway and goes on from there


def rows() -> list[dict[str, list[int]]]:
    torch.manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (32, LENGTH)).tolist()
    return [{"input_ids": row, "labels": [IGNORED] * QUESTION + row[QUESTION:]} for row in ids]


def padded(examples: list[dict[str, list[int]]]) -> dict[str, Any]:
    found = {name: torch.tensor([each[name] for each in examples]) for name in examples[0]}
    return found | {"attention_mask": torch.ones_like(found["input_ids"])}


def packed(examples: list[dict[str, list[int]]]) -> dict[str, Any]:
    given = {name: torch.tensor([each[name] for each in examples]).flatten() for name in examples[0]}
    return {"packed": given | {"lengths": torch.full((len(examples),), LENGTH)}}


def adapted(case: dict[str, Any]) -> Any:
    """The same in every process."""
    own = {"num_experts": 3, "prompts_per_expert": 4, "injection_layer": 2, "gate_hidden_size": 8, "init": "random"}
    config = MoPsConfig(**own | case.get("adapter", {}), task_type="CAUSAL_LM")
    model = get_peft_model(build(**case.get("base", {})), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


def trained(name: str, folder: Path) -> dict[str, Any]:
    """Losses, what is saved, and an answer; of several processes together, whose base is sharded while they train."""
    case, world = CASES[name], int(os.environ.get("WORLD_SIZE", "1"))
    model = adapted(case)
    sharded = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    arguments = TrainingArguments(
        output_dir=str(folder / name), per_device_train_batch_size=BATCH // world, max_steps=STEPS, learning_rate=0.01,
        lr_scheduler_type="constant", logging_steps=1, save_strategy="steps" if name == KEPT else "no", save_steps=2,
        max_grad_norm=0.1, report_to="none", use_cpu=True, disable_tqdm=True, remove_unused_columns=False, seed=1,
        **(sharded if world > 1 else {}), **case.get("arguments", {}),
    )  # fmt: skip
    collate = packed if case.get("packed") else padded
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(), data_collator=collate)
    if world > 1:
        _shard_on_cpu(trainer)
    checkpoint = folder / name / "checkpoint-2"
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint.exists() else None)
    trainer.save_model(str(folder / name / "adapter"))
    prompt = {key: value[:2, :QUESTION] for key, value in padded(rows()).items() if key != "labels"}
    return {
        "losses": [each["loss"] for each in trainer.state.log_history if "loss" in each],
        "whole": [key for key, value in trainer.model.named_parameters() if not isinstance(value, DTensor)],
        "answer": trainer.model.eval().generate(**prompt, max_new_tokens=4, do_sample=False)[:, QUESTION:].tolist(),
    }


def _shard_on_cpu(trainer: Trainer) -> None:
    """accelerate takes FSDP for a matter of GPUs alone, and without one it would wrap the model in plain DDP."""
    state: Any = trainer.accelerator.state
    for held in (state._shared_state, PartialState._shared_state):
        held["distributed_type"] = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    trainer.is_fsdp_enabled = True


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
    found = {name: trained(name, folder) for name in CASES}
    found["again"] = trained(KEPT, folder)
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
