"""The parameters of a fresh adapter: random experts of the base's own size, a uniform gate. Trains nothing."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor

from smartmops.experts import keys_values, null

from .config import MoPsConfig

CLAIM_RANK = 8  # directions in which the rule of an added expert measures distance


def parameters(backbone: Any, first: int, config: MoPsConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By name, what is trained and what stays as it is; `config` learns the shape of keys and values.

    Raises:
        BaseModelError: experts are to be keys and values, and the layers' own differ in shape.
    """
    hidden, width = config.base_hidden_size, config.embedding_size or config.base_hidden_size
    assert hidden is not None and width is not None
    with align_module_device(backbone.get_input_embeddings()):
        table = backbone.get_input_embeddings().weight
        spread = float(table.detach().float().std()) if table.is_floating_point() and not table.is_meta else 0.02
    made = _keys_values(backbone, first, config) if config.experts == "keys_values" else _hidden_states(config, spread)
    trained, frozen = made
    trained["mops_gate_in"] = torch.randn(config.gate_hidden_size, width) * (2 / width) ** 0.5
    trained["mops_gate_out"] = torch.zeros(config.num_rows, config.gate_hidden_size)
    if config.gate_bias:
        trained["mops_gate_bias"] = torch.zeros(config.num_rows)
    frozen |= {
        "mops_recovery": torch.randn(config.num_recovery_prompts, hidden) * spread,
        "mops_gate_mean": torch.zeros(width),
        "mops_gate_scale": torch.ones(width),
    }
    if config.null_expert:
        rank = min(null.RANK, width)
        frozen |= {
            "mops_null_basis": torch.zeros(rank, width),
            "mops_null_centres": torch.zeros(config.num_rows if config.routes else config.num_experts, rank),
            "mops_null_direction": torch.zeros(width),
            "mops_null_cut": torch.tensor([torch.inf, 1.0, torch.inf]),
        }
    if config.claims:  # rules that hold nowhere
        rank = min(CLAIM_RANK, width)
        frozen |= {
            "mops_claim_basis": torch.zeros(config.claims, rank, width),
            "mops_claim_centre": torch.zeros(config.claims, rank),
            "mops_claim_direction": torch.zeros(config.claims, width),
            "mops_claim_cut": torch.tensor([[torch.inf, 1.0, torch.inf, -torch.inf]]).repeat(config.claims, 1),
        }
    return trained, frozen


def _hidden_states(config: MoPsConfig, spread: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    hidden = config.base_hidden_size
    assert hidden is not None
    trained = {"mops_prompts": torch.randn(config.num_prompts, hidden) * spread}
    if config.shared_prompts:
        trained["mops_shared"] = torch.randn(config.shared_prompts, hidden) * spread
    return trained, {}


def _keys_values(backbone: Any, first: int, config: MoPsConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    if config.key_value_shape is None:
        found = keys_values.probe(backbone, first)
        config.key_value_shape = found.shape
        frozen = {"mops_key_size": keys_values.size(found.keys), "mops_value_size": keys_values.size(found.values)}
    else:  # an adapter that was trained before: its own sizes are about to be loaded
        frozen = {name: torch.ones(config.key_value_shape[0]) for name in ("mops_key_size", "mops_value_size")}
    layers, heads, key, value = config.key_value_shape
    starts = torch.zeros if config.prefix_attention == "linear" else torch.randn
    trained = {
        "mops_keys": torch.randn(config.num_prompts, layers, heads, key),
        "mops_values": starts(config.num_prompts, layers, heads, value),
    }
    if config.shared_prompts:
        trained["mops_shared_keys"] = torch.randn(config.shared_prompts, layers, heads, key)
        trained["mops_shared_values"] = starts(config.shared_prompts, layers, heads, value)
    if config.prefix_attention == "separate":
        queries = int(backbone.config.get_text_config().num_attention_heads)
        trained["mops_head_weight"] = torch.zeros(layers, queries)
    return trained, frozen
