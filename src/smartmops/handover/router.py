"""The gate, with the lower half of the base that it reads, as one ONNX graph that names experts. Trains nothing.

Prompts below the gate's layer never see the text, and text never sees what comes after it, so the graph needs no mask:
rows may be padded on the right.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from smartmops.backbone import halves
from smartmops.checks.errors import MissingExtra
from smartmops.experts import gate, null, routes
from smartmops.tuner.layer import MoPsLayer

NEEDS = ("onnx", "onnxscript", "onnxruntime")
MISSING = "the router is an ONNX graph, and {} is not installed: pip install 'smartmops[onnx]'"
OPSET = 18
RULE = ("basis", "centre", "direction", "cut")  # of an expert added later (see experts/routes.py)


class Gate(nn.Module):
    """Pooled hidden states, or another model's embedding of the text, in; weights and what is left to the base out."""

    def __init__(self, layer: MoPsLayer, adapter: str) -> None:
        super().__init__()
        self.config = layer.configs[adapter]
        names = [f"gate_{name}" for name in ("mean", "scale", "in", "out")]
        if self.config.gate_bias:
            names += ["gate_bias"]
        if self.config.null_expert:
            names += [f"null_{name}" for name in ("basis", "centres", "direction", "cut")]
        if self.config.claims:
            names += [f"claim_{name}" for name in RULE]
        for name in names:
            value = getattr(layer, f"mops_{name}")[adapter]
            self.register_buffer(name, value.detach().float().cpu().clone())

    def forward(
        self, features: Float[Tensor, "rows inputs"]
    ) -> tuple[Float[Tensor, "rows experts"], Float[Tensor, " rows"]]:
        """Weight of each expert among them, which sum to one, and the share of all that is left to the base."""
        config, parts = self.config, dict(self.named_buffers())
        standardised = (features - parts["gate_mean"]) / parts["gate_scale"]
        log_g = gate.log_gate(
            features, parts["gate_mean"], parts["gate_scale"], parts["gate_in"], parts["gate_out"],
            config.gate_temperature, config.gate_top_k, config.gate_renormalise, parts.get("gate_bias"),
        )  # fmt: skip
        holds = None
        if config.claims:
            holds = routes.held(standardised, *(parts[f"claim_{name}"] for name in RULE))
        if config.routes is not None:
            log_g = routes.log_weights(log_g, holds, config.routes, config.num_experts)
        weights = gate.by_expert(log_g.exp(), config.num_experts)
        left = torch.zeros_like(weights[:, 0])
        if config.null_expert:
            left = null.weight(standardised, parts["null_basis"], parts["null_centres"], parts["null_direction"],
                               parts["null_cut"], config.null_threshold)  # fmt: skip
            left = left if holds is None else left.masked_fill(holds.any(-1), 0.0)
        return weights, left


class Router(nn.Module):
    """Token ids and what of them the gate reads in, weights out."""

    def __init__(self, base: Any, layer: MoPsLayer, adapter: str, index: int) -> None:
        super().__init__()
        backbone = halves.backbone_of(base)
        self.embed: Any = backbone.get_input_embeddings()
        self.lower = halves.lower(backbone, index)
        self.gate = Gate(layer, adapter)
        prompts = layer.mops_recovery[adapter] if self.gate.config.num_recovery_prompts else None
        self.prompts: Tensor | None
        self.register_buffer("prompts", None if prompts is None else prompts.detach().float().cpu().clone())

    def forward(
        self, input_ids: Int[Tensor, "rows tokens"], reads: Int[Tensor, "rows tokens"]
    ) -> tuple[Float[Tensor, "rows experts"], Float[Tensor, " rows"]]:
        """As `Gate`; `reads` is 1 on the tokens that the gate reads."""
        columns: Tensor = self.embed(input_ids)
        if self.prompts is not None:
            columns = torch.cat([self.prompts.expand(columns.shape[0], -1, -1), columns], 1)
        at = torch.arange(columns.shape[1])
        hidden = torch.zeros(columns.shape[1], columns.shape[1])
        hidden = hidden.masked_fill(at[None, :] > at[:, None], torch.finfo(torch.float32).min)
        out = self.lower(inputs_embeds=columns, attention_mask=hidden[None, None], position_ids=at[None],
                         use_cache=False)  # fmt: skip
        text = out.last_hidden_state[:, columns.shape[1] - input_ids.shape[1] :]
        return self.gate(gate.pool(text, reads > 0))  # type: ignore[no-any-return]


def by_name(layer: MoPsLayer, adapter: str) -> list[str]:
    """Names of the experts that no text is sent to: neither a row of the gate leads there, nor a rule that can hold."""
    config = layer.configs[adapter]
    if config.routes is None:
        return []
    limits = layer.mops_claim_cut[adapter][:, 3].tolist() if config.claims else []
    open_to = [True] * config.num_rows + [limit > -torch.inf for limit in limits]
    reached = {expert for expert, ever in zip(config.routes, open_to, strict=True) if ever}
    return [name for expert, name in enumerate(config.named_experts) if expert not in reached]


def write_onnx(module: nn.Module, example: dict[str, Tensor], folder: Path) -> None:
    """Write a module as `router.onnx`: rows (and tokens) of named inputs in, `weights` and `left_to_base` out.

    Raises:
        ImportError: ONNX is not installed; the message has its `pip install` line.
    """
    check_installed()
    axes = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens")}
    shapes = tuple(axes if each.dtype == torch.long else {0: axes[0]} for each in example.values())
    level = logging.root.manager.disable
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)  # of passes of the optimiser that do not apply
        try:
            torch.onnx.export(
                module.eval(), tuple(example.values()), folder / "router.onnx", input_names=list(example),
                output_names=["weights", "left_to_base"], opset_version=OPSET, dynamo=True, dynamic_shapes=shapes,
                verbose=False, external_data=False,
            )  # fmt: skip
        finally:
            logging.disable(level)


def check_installed() -> None:
    """Whether ONNX is there, before anything is loaded.

    Raises:
        ImportError: it is not.
    """
    from importlib.util import find_spec

    if missing := [name for name in NEEDS if find_spec(name) is None]:
        raise MissingExtra(MISSING.format(missing[0]))


def write_words(folder: Path, about: dict[str, Any], tokenizer: Any) -> None:
    """Write `router.json`, the tokenizer, and the program that puts them together."""
    (folder / "router.json").write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copy(Path(__file__).with_name("alone") / "route.py", folder / "route.py")
