"""An adapter of your own, prepared by `sm.prepare`, trained by Hugging Face's Trainer or TRL's SFTTrainer.

python examples/hf_trainer.py --model smollm2 --steps 150 [--trl]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

import smartmops as sm

DATA = Path(__file__).parent / "data/support.jsonl"


def adapted(base: Any, tasks: int) -> Any:
    """The base with an adapter whose experts and gate are still random."""
    config = sm.MoPsConfig(
        task_type="CAUSAL_LM",
        num_experts=tasks,
        prompts_per_expert=10,
        experts="keys_values",
        visible_to="answers",
        gate_bias=True,
        null_expert=True,
    )
    return get_peft_model(base, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a folder, a hub id, a *.gguf file, smollm2 or tiny")
    parser.add_argument("--steps", type=int, default=150, help="optimiser steps of 4 examples")
    parser.add_argument("--out", default="runs/trainer", help="folder of checkpoints and adapter")
    parser.add_argument("--trl", action="store_true", help="train with TRL's SFTTrainer on the same tokens")
    given = parser.parse_args()

    base, tokenizer = sm.load_base(given.model, "float32")
    examples = sm.read(DATA)
    model = adapted(base, len({example.category for example in examples}))
    ready = sm.prepare(model, tokenizer, examples)
    print(f"experts: {', '.join(ready.expert_names)}; the gate is right in {ready.gate_accuracy:.0%}")

    # Keys and values are in units of their own size: a rate of 0.03 moves them by about 3 % a step.
    settings = {"output_dir": given.out, "max_steps": given.steps, "per_device_train_batch_size": 4,
                "learning_rate": 0.03, "report_to": "none", "save_strategy": "no"}  # fmt: skip
    if given.trl:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        rows = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in ready.rows])
        trainer: Any = SFTTrainer(
            model, SFTConfig(**settings, bf16=False), train_dataset=rows, processing_class=tokenizer
        )
    else:
        trainer = Trainer(model, TrainingArguments(**settings, remove_unused_columns=False),
                          train_dataset=list(ready.rows), data_collator=ready.collator)  # fmt: skip
    trainer.train()
    model.save_pretrained(f"{given.out}/adapter")
    PeftModel.from_pretrained(sm.load_base(given.model)[0], f"{given.out}/adapter")
    print(f"the adapter is in {given.out}/adapter")


if __name__ == "__main__":
    main()
