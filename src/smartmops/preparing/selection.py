"""Gates that nobody trains, to measure the learned one against: even weights, the true task, the nearest cluster.

Knows a task's rows and a MoPs model's gate. What selects is told to the gate as a one-hot embedding; wired to pass
it on and to keep the highest, the gate makes a weight of one of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from sklearn.cluster import KMeans
from torch import Tensor

from smartmops.checks.errors import ConfigError
from smartmops.methods.baselines import peft_config
from smartmops.options.method import MethodConfig
from smartmops.reading.task import Task
from smartmops.runs.adapters import adapter_on
from smartmops.states.instructions import instructions
from smartmops.states.states import States
from smartmops.tokens.batches import Encoded


def told(task: Task, method: MethodConfig, seed: int) -> Task:
    """The task, or where the method's gate is told what to choose, one whose rows say it.

    They carry a one-hot `gate_embedding` [experts]: of the row's task, or of the nearest k-means centre. Centres are
    those of the standardised training instructions.

    Raises:
        ConfigError: more tasks than experts, or a test task that training never saw.
    """
    if not method.traits.told:
        return task
    rest = [*task.test, *task.validation]
    known, asked = (_by_task if method.traits.by_task else _by_centre)(task.base, task.train, rest, method, seed)
    train, after = _marked(task.train, known, method.number), _marked(rest, asked, method.number)
    count = len(task.test)
    states = States(task.states.where)  # of its own, which go when the task goes
    return replace(task, train=train, test=after[:count], validation=after[count:], states=states)


def _by_task(
    base: Any, train: Sequence[Encoded], rest: Sequence[Encoded], method: MethodConfig, seed: int
) -> tuple[list[int], list[int]]:
    tasks = sorted({row.category for row in train})
    if unknown := sorted({row.category for row in rest} - set(tasks)):
        raise ConfigError(f"--method {method.method} is told the task, but {unknown[0]!r} is in no training example: "
                          "choose another method, or data whose test tasks are trained on")  # fmt: skip
    if len(tasks) > method.number:
        raise ConfigError(f"--experts {method.number}, but there are {len(tasks)} tasks: choose {len(tasks)}")
    return [tasks.index(row.category) for row in train], [tasks.index(row.category) for row in rest]


def _by_centre(
    base: Any, train: Sequence[Encoded], rest: Sequence[Encoded], method: MethodConfig, seed: int
) -> tuple[list[int], list[int]]:
    model = adapter_on(base, peft_config(replace(method, method="mops", embedder=None)))
    seen = instructions(model, train)
    later = instructions(model, rest) if rest else seen[:0]
    model.base_model.unload()
    base.requires_grad_(False)
    mean, scale = seen.mean(0), seen.std(0).clamp(min=1e-6)
    found = KMeans(method.number, n_init=4, random_state=seed).fit(((seen - mean) / scale).cpu().numpy())
    after = found.predict(((later - mean) / scale).cpu().numpy()).tolist() if rest else []
    return found.labels_.tolist(), after


def _marked(rows: Sequence[Encoded], groups: Sequence[int], count: int) -> list[Encoded]:
    eye = torch.eye(count)
    return [replace(row, gate_embedding=eye[group]) for row, group in zip(rows, groups, strict=True)]


@torch.no_grad()
def wire(model: Any) -> None:
    """The gate passes a one-hot embedding [experts] on as it is, and is trained no more."""
    gate_in, gate_out = _gate(model)
    for matrix in (gate_in, gate_out):
        matrix.copy_(torch.eye(*matrix.shape))
        matrix.requires_grad_(False)


@torch.no_grad()
def level(model: Any) -> None:
    """Every expert the same weight, and never another."""
    for matrix in _gate(model):
        matrix.zero_()
        matrix.requires_grad_(False)


def _gate(model: Any) -> tuple[Float[Tensor, "d_g inputs"], Float[Tensor, "groups d_g"]]:
    layer = model.base_model.layer()
    return layer.mops_gate_in["default"], layer.mops_gate_out["default"]
