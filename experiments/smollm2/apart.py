"""A LoRA for each task: which one answers is told, or chosen by the gate that MoPs start with.

Knows a bench. Together they train as many steps and numbers as one LoRA for all tasks.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import asked
import torch

from smartmops.evaluation.perplexity import Evaluation, evaluate
from smartmops.options.training import TrainConfig
from smartmops.preparing.adapting import adapt
from smartmops.states.states import States
from smartmops.tokens.batches import Encoded

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
    own = replace(config, steps=round(config.steps / len(bench.tasks)), experts=1)
    parameters = 0

    def measure(model: Any, name: str) -> None:
        for part, rows in routes.items():
            if some := [row for of, row in rows if of == name]:
                found[part].append(evaluate(model, some, task.collator))

    measure(task.base, BASE)
    for name in bench.tasks:
        alone = replace(task, train=[row for row in task.train if row.category == name], states=States())
        model, _, _ = adapt(alone, own, own, config.seed)
        parameters += sum(p.numel() for p in model.parameters() if p.requires_grad)
        bench.fitted(alone, model, own)
        measure(model, name)
        if bench.asked and told:
            answers.append(asked.answers(task, model, [each for each in bench.asked if each.category == name]))
        bench.bare(model)
    measured = {part: Evaluation.merged(each) for part, each in found.items()}
    return {
        "measured": {part: vars(each) for part, each in measured.items()}, "parameters": parameters,
        "right": _right(routes["test"]), **({"answers": asked.joined(answers)} if answers else {}),
        "seconds": {"prepare": 0.0, "train": time.perf_counter() - started, "evaluate": 0.0},
    }  # fmt: skip


def _right(rows: Sequence[tuple[str, Encoded]]) -> float:
    """Share of rows that the LoRA of their own task answers."""
    return sum(of == row.category for of, row in rows) / len(rows)
