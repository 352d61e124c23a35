"""Magnitude pruning: the smallest weights of every linear layer become zero. No calibration text, no solver."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from smartmops.tuner.halves import layers_name


@torch.no_grad()
def prune_magnitude(model: Any, sparsity: float) -> float:
    """Zero the share `sparsity` of smallest absolute weights of each linear layer inside the decoder layers, in place.

    Embeddings, head and norms are left alone. Returns the share of zeros reached over all pruned layers.

    Raises:
        ValueError: `sparsity` is not between 0 and 1.
    """
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity={sparsity}: choose a share of zeros between 0 and 1, such as 0.5")
    zeros = total = 0
    layers = getattr(model.base_model, layers_name(model.base_model))
    for module in layers.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight
            count = round(sparsity * weight.numel())
            weight.view(-1)[weight.abs().flatten().topk(count, largest=False).indices] = 0
            zeros, total = zeros + int((weight == 0).sum()), total + weight.numel()
    return zeros / total
