"""A fresh adapter on a task's base, prepared for training: recovery prompts, the gate, experts from real text.

Knows a task, its states and the settings of a method. Knows no training loop and writes no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from transformers import set_seed

from smartmops.methods.baselines import build
from smartmops.options.method import GatePretraining, MethodConfig
from smartmops.options.training import TaskConfig
from smartmops.progress.bars import console
from smartmops.reading.task import Task
from smartmops.rows.example import Example
from smartmops.runs import ranks
from smartmops.states.instructions import layer_means
from smartmops.tokens.batches import Encoded, encode_all
from smartmops.tokens.frames import gate_frame

from . import gating
from .initial import initialise
from .pretrain import assign, pretrain_gate, standardise, train_recovery
from .selection import level, wire

UNRELATED = 512  # tokens of a text of no task, at most


def recovered(task: Task, config: TaskConfig) -> Task:
    """The task, with recovery prompts where the method takes some; an adapted base brings its own, or none."""
    if not config.recovered_by or not config.traits.ours or isinstance(task.base, PeftModel):
        return task
    size = config.batch_size * ranks.world()
    found = train_recovery(task.base, task.train, task.collator, config.recovered_by, config.recovery_steps,
                           config.recovery_lr, size, config.seed)  # fmt: skip
    return replace(task, recovery=found)


def adapt(task: Task, method: MethodConfig, gate: GatePretraining, seed: int) -> tuple[Any, list[str], float | None]:
    """A fresh adapter, experts initialised and gate pretrained; also expert names and the gate's accuracy."""
    set_seed(seed)
    width = task.embedder.width if task.embedder and method.traits.reads else None
    method = placed(task, method, gate, width)
    width = method.experts if method.traits.told else width
    model = build(task.base, method, task.recovery, width, words(task, method))
    return (model, *start(task, model, method, gate, seed)) if method.traits.ours else (model, [], None)


def start(
    task: Task, model: Any, method: MethodConfig, gate: GatePretraining, seed: int
) -> tuple[list[str], float | None]:
    """Fit the gate and initialise the experts of a fresh adapter; expert names and the gate's accuracy."""
    config = model.base_model.layer().configs["default"]
    names, accuracy, rows, expert_of = ["all"], None, task.train, [0] * len(task.train)
    if not config.gate_is_idle:
        rows, expert_of, names, accuracy = _gate(task, model, method, gate, seed)
        config.expert_names = names
    if method.init == "hidden_states":
        initialise(model, rows, task.collator, expert_of, seed)
    return names, accuracy


def words(task: Task, method: MethodConfig) -> dict[str, Any]:
    """What an adapter must know of the template; with a plain frame, hidden states are read as they always were."""
    own = method.expert_kind == "keys_values" or task.template.source is not None
    return {"answer_header": task.template.header_ids, "gate_frame": gate_frame(task.template),
            "gate_reads": "own" if own else "all"}  # fmt: skip


def placed(task: Task, method: MethodConfig, gate: GatePretraining, width: int | None) -> MethodConfig:
    """With the layer that the gate reads, where that is to be found out."""
    if width is not None or not method.seeks_layer:
        return method
    layers = int(task.base.config.get_text_config().num_hidden_layers)
    of, tasks = _tasks(task.train)
    if gate.gate_pretraining != "labels" or len(tasks) < 2:
        return replace(method, gate_layer=layers // 2)
    found, key = task.states.found, ("gate layer", task.states.texts(task.train))
    if key not in found:
        chosen = gating.draw(of, gating.PROBED, 0)
        means = layer_means(task.base, [task.train[i] for i in chosen])
        found[key] = gating.best_layer(means, [of[i] for i in chosen], len(tasks), layers - 1)
        console.print(f"the gate reads layer {found[key]}, where instructions tell their tasks apart best")
    return replace(method, gate_layer=found[key])


def _tasks(rows: Sequence[Encoded]) -> tuple[list[int], list[str]]:
    """The number of each row's task, and the tasks in that order."""
    tasks = sorted({row.category for row in rows})
    return [tasks.index(row.category) for row in rows], tasks


def _gate(
    task: Task, model: Any, method: MethodConfig, gate: GatePretraining, seed: int
) -> tuple[Sequence[Encoded], list[int], list[str], float | None]:
    """Make the gate what the method wants.

    Returns:
        The rows that it was fitted on (where states of all rows are not wanted before training, a sample of them), the
        expert that each is meant for, the experts' names, and the gate's accuracy.
    """
    config, accuracy = model.base_model.layer().configs["default"], None
    if method.traits.told:
        wire(model)
        pooled = task.states.pooled(model, task.train)
        names = [f"cluster {i}" for i in range(config.num_experts)]
        if method.traits.by_task:
            _, names = assign(task.train, pooled, config.num_experts, "labels", seed)
        return task.train, pooled.argmax(-1).tolist(), names, None
    rows = task.train
    if config.experts == "keys_values":
        rows = [rows[i] for i in gating.draw(_tasks(rows)[0], gating.FITTED, 0)]
        pooled = task.states.read(model, rows)
    else:
        pooled = task.states.pooled(model, rows)
    standardise(model, pooled)
    alone = config.num_experts == 1  # then there is nothing to teach but which text to leave to the base
    expert_of, names = ([0] * len(rows), ["all"]) if alone else assign(
        rows, pooled, config.num_experts, _meant_by(task, gate), seed, gate.expert_names
    )  # fmt: skip
    if method.traits.gate == "even":
        level(model)
    elif not alone and gate.gate_pretraining != "none" and method.traits.learned:
        accuracy = _taught(model, pooled, torch.tensor(expert_of), gate)
    if config.null_expert:
        _fit_null(task, model, method, pooled, expert_of)
    return rows, expert_of, names, accuracy


def _meant_by(task: Task, gate: GatePretraining) -> str:
    """What says which expert an instruction is meant for: its category, or else its cluster."""
    if gate.gate_pretraining == "labels" and gate.expert_names is None and not any(r.category for r in task.train):
        console.print("no example has a category, so each expert is meant for a cluster of instructions")
        return "clusters"
    return "clusters" if gate.gate_pretraining == "none" else gate.gate_pretraining


def _taught(model: Any, pooled: Float[Tensor, "n inputs"], expert_of: Tensor, gate: GatePretraining) -> float:
    """Teach the gate in closed form where it can carry that, else by Adam; its accuracy."""
    layer = model.base_model.layer()
    config = layer.configs["default"]
    if gate.gate_start == "gradient" or not config.gate_bias:
        return pretrain_gate(model, pooled, expert_of, gate)
    scores = gating.ridge(layer.standardised(pooled, "default"), expert_of, config.num_experts)
    gating.start_gate(model, scores)
    return scores.accuracy


def _fit_null(
    task: Task, model: Any, method: MethodConfig, pooled: Float[Tensor, "n inputs"], expert_of: list[int]
) -> None:
    examples = [Example(text, "", ".") for text in gating.unrelated_texts(method.unrelated)]
    rows = encode_all(examples, task.tokenizer, UNRELATED, task.embedder, template=task.template).rows
    fitted = gating.fit_null(model, pooled, expert_of, task.states.read(model, rows))
    console.print(f"null expert: {fitted.caught:.0%} of {len(rows)} unrelated texts are left to the base, and "
                  f"{1 - fitted.kept:.0%} of held-out training instructions")  # fmt: skip
