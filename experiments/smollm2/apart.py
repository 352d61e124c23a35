"""A LoRA for each task: which one answers is told, or chosen by the gate that MoPs start with, or by X-LoRA's.

Knows a bench. Together they train as many steps and numbers as one LoRA for all tasks.
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import asked
import torch
from peft import XLoraConfig, get_peft_model
from transformers import set_seed

from smartmops.evaluation.perplexity import Evaluation, evaluate
from smartmops.options.training import TrainConfig
from smartmops.preparing.adapting import adapt
from smartmops.states.states import States
from smartmops.tokens.batches import Encoded

XLORA_RATE = 1e-3  # of the gate, several times what its authors train 7B models with
BASE = "base"  # who answers what the gate leaves to it


def chosen(bench: Any, config: TrainConfig, told: bool) -> dict[str, list[tuple[str, Encoded]]]:
    """Of each part, its rows with the task whose LoRA answers them.

    `unseen, nearest` are the rows of tasks nobody trains on, none of which is left to the base.
    """
    if told:
        return {part: [(row.category, row) for row in bench.rows[part]] for part in ("validation", "test")}
    model, names, _ = adapt(bench.task, replace(config, method="mops", prompt_lr=None), config, config.seed)
    layer = model.base_model.layer()
    found = {}
    for part, rows in bench.rows.items():
        pooled = bench.task.states.read(model, rows)
        with torch.no_grad():
            nearest = [names[at] for at in layer.log_gate(pooled, "default").argmax(-1)]
            lost = (layer.null_weight(pooled, "default") > 0.5).tolist()
        own = [BASE if to_base else name for to_base, name in zip(lost, nearest, strict=True)]
        found[part] = list(zip(own, rows, strict=True))
        if part == "unseen":
            found["unseen, nearest"] = list(zip(nearest, rows, strict=True))
    bench.bare(model)
    return found


def run(bench: Any, config: TrainConfig, told: bool) -> dict[str, Any]:
    """Train and measure all of them."""
    started, task = time.perf_counter(), bench.task
    routes = chosen(bench, config, told)
    found: dict[str, list[Evaluation]] = defaultdict(list)
    answers: list[dict[str, Any]] = []
    parameters = 0

    def measure(model: Any, name: str) -> None:
        for part, rows in routes.items():
            if some := [row for of, row in rows if of == name]:
                found[part].append(evaluate(model, some, task.collator))

    measure(task.base, BASE)
    for name, model in trained(bench, config):
        parameters += sum(p.numel() for p in model.parameters() if p.requires_grad)
        measure(model, name)
        if bench.asked and told:
            answers.append(asked.answers(task, model, [each for each in bench.asked if each.category == name]))
    measured = {part: Evaluation.merged(each) for part, each in found.items()}
    return {
        "measured": {part: vars(each) for part, each in measured.items()}, "parameters": parameters,
        "right": _right(routes["test"]), **({"answers": asked.joined(answers)} if answers else {}),
        "seconds": {"prepare": 0.0, "train": time.perf_counter() - started, "evaluate": 0.0},
    }  # fmt: skip


def trained(bench: Any, config: TrainConfig) -> Iterator[tuple[str, Any]]:
    """Each task, and the base with its LoRA, which comes off again after that; together as many steps as one LoRA."""
    own = replace(config, steps=round(config.steps / len(bench.tasks)), experts=1)
    for name in bench.tasks:
        alone = replace(bench.task, train=[row for row in bench.task.train if row.category == name], states=States())
        model, _, _ = adapt(alone, own, own, config.seed)
        bench.fitted(alone, model, own)
        yield name, model
        bench.bare(model)


def mixed(bench: Any, config: TrainConfig) -> dict[str, Any]:
    """X-LoRA as PEFT has it: all of them at once, weighted by a gate that is trained after them, by as many steps again.

    At its own defaults: one weight for each LoRA at each token, from what a first pass of the bare base makes of it.
    """
    started, task = time.perf_counter(), bench.task
    with TemporaryDirectory() as folder:
        adapters = {}
        for number, (_, model) in enumerate(trained(bench, config)):
            model.save_pretrained(adapters.setdefault(str(number), f"{folder}/{number}"))
        base = copy.deepcopy(task.base)  # X-LoRA cannot be taken off again
        base.config.use_cache = False
        set_seed(config.seed)
        gate = XLoraConfig(task_type="CAUSAL_LM", hidden_size=base.config.hidden_size, adapters=adapters)
        model = get_peft_model(base, gate)
    bench.fitted(replace(task, base=base, states=States()), model, replace(config, prompt_lr=XLORA_RATE))
    trained_at = time.perf_counter()
    return {
        "measured": bench.measure(model, task, bench.rows),
        "parameters": sum(p.numel() for name, p in model.named_parameters() if p.requires_grad or "lora_" in name),
        "seconds": {"prepare": 0.0, "train": trained_at - started, "evaluate": time.perf_counter() - trained_at},
    }  # fmt: skip


def _right(rows: Sequence[tuple[str, Encoded]]) -> float:
    """Share of rows that the LoRA of their own task answers."""
    return sum(of == row.category for of, row in rows) / len(rows)
