"""What comes before training: recovery prompts, experts from real text, and a gate that already tells tasks apart.

Knows instructions and their tasks. The gate's pretraining never sees a response (paper, "Pretraining the gating
function").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from sklearn.cluster import KMeans
from torch import Tensor

from smartmops.checks.errors import ConfigError, DataError
from smartmops.evaluation.perplexity import batch_for
from smartmops.options.method import GatePretraining
from smartmops.progress.bars import track
from smartmops.runs.adapters import adapter_on
from smartmops.tokens.batches import Collator, Encoded
from smartmops.tuner import MoPsConfig

from .initial import initialise


def train_recovery(base: Any, rows: Sequence[Encoded], collator: Collator, count: int, steps: int, lr: float,
                   batch_size: int, seed: int) -> Float[Tensor, "R hidden"]:  # fmt: skip
    """P^1: `count` ungated prompts at the input, trained for a few steps so that a compressed base recovers.

    They are one causal expert at injection layer 0, taken off the base again afterwards.
    """
    config = MoPsConfig(num_experts=1, prompts_per_expert=count, injection_layer=0, expert_attention="causal",
                        task_type="CAUSAL_LM")  # fmt: skip
    torch.manual_seed(seed)
    model = adapter_on(base, config)
    initialise(model, rows, collator, [0] * len(rows), seed)
    prompts = model.base_model.layer().mops_prompts["default"]
    optimiser = torch.optim.AdamW([prompts], lr=lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for step in track(range(steps), "recovery prompts"):
        chosen = torch.randint(len(rows), (batch_size,), generator=generator).tolist()
        optimiser.param_groups[0]["lr"] = lr * (1 - step / steps)
        model(**batch_for(model, [rows[i] for i in chosen], collator), use_cache=False).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    found: Tensor = prompts.detach().clone()
    model.unload()
    base.requires_grad_(False)
    return found


def assign(rows: Sequence[Encoded], pooled: Float[Tensor, "n d_in"], experts: int, how: str, seed: int,
           given: Sequence[str] | None = None) -> tuple[list[int], list[str]]:  # fmt: skip
    """The expert each example is meant for (task labels 1:1, or k-means clusters), and the experts' names.

    Raises:
        ConfigError, DataError: labels are asked for, but there are none, more tasks than experts, or a task that no
            expert in `given` is meant for.
    """
    tasks = sorted({row.category for row in rows})
    if how == "labels":
        if tasks == [""]:
            raise ConfigError("--gate-pretraining labels, but no example has a category: add one, or choose clusters")
        if given is not None and (unknown := [task for task in tasks if task not in given]):
            raise ConfigError(f"--expert-names {' '.join(given)} lack category {unknown[0]!r}: name an expert for it, "
                              "leave its examples out, or choose --gate-pretraining clusters")  # fmt: skip
        if len(tasks) > experts:
            raise ConfigError(f"--experts {experts}, but there are {len(tasks)} tasks: choose {len(tasks)}, or "
                              "--gate-pretraining clusters")  # fmt: skip
        names = list(given) if given is not None else tasks
        names += [f"expert {i}" for i in range(len(names), experts)]
        return [names.index(row.category) for row in rows], names
    if len(rows) < experts:
        raise DataError(f"{len(rows)} examples cannot form {experts} clusters: give more data, or fewer --experts")
    standard = (pooled - pooled.mean(0)) / pooled.std(0).clamp(min=1e-6)
    found = KMeans(experts, n_init=4, random_state=seed).fit(standard.cpu().numpy()).labels_.tolist()
    return found, [f"cluster {i}" for i in range(experts)]


def standardise(model: Any, pooled: Float[Tensor, "n d_in"]) -> None:
    """Store mean and scale of the training instructions as the gate's frozen buffers."""
    layer = model.base_model.layer()
    layer.mops_gate_mean["default"].data.copy_(pooled.mean(0))
    scale = pooled.std(0) if len(pooled) > 1 else torch.ones_like(pooled[0])
    layer.mops_gate_scale["default"].data.copy_(scale.clamp(min=1e-6))


def pretrain_gate(
    model: Any, pooled: Float[Tensor, "n d_in"], expert_of: Int[Tensor, " n"], config: GatePretraining
) -> float:
    """Cross-entropy from instruction embeddings to experts; returns the share of instructions sent to their expert."""
    layer = model.base_model.layer()
    own = layer.configs["default"]
    gate = [layer.mops_gate_in["default"], layer.mops_gate_out["default"]]
    optimiser = torch.optim.Adam(gate, lr=config.gate_pretraining_lr)
    per = own.num_groups // own.num_experts  # under granularity "prompt" an expert's weight is the sum over its prompts

    def log_expert() -> Float[Tensor, "n experts"]:
        log_g: Float[Tensor, "n groups"] = layer.log_gate(pooled, "default")
        return log_g if per == 1 else log_g.view(-1, own.num_experts, per).logsumexp(-1)

    for _ in track(range(config.gate_pretraining_steps), "gate pretraining"):
        loss = F.nll_loss(log_expert(), expert_of.to(pooled.device))
        torch.autograd.backward(loss)
        optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad():
        return (log_expert().argmax(-1).cpu() == expert_of).float().mean().item()
