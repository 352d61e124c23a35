"""Views of parts of one backbone (lower half, upper half, one layer), sharing every weight. No prompts, no adapters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

SCALES = ("embedding_multiplier", "embed_scale", "embedding_scale", "scale_emb")  # Granite's name, and other models'
FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


def hidden_size(backbone: Any) -> int:
    """Width of the hidden states."""
    return int(backbone.config.get_text_config().hidden_size)


def layers_name(backbone: Any) -> str:
    """The attribute that holds the decoder layers.

    Raises:
        ValueError: there is none, so this is no plain decoder-only backbone.
    """
    count = getattr(backbone.config, "num_hidden_layers", None)
    for name, child in backbone.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return str(name)
    raise ValueError(
        f"{type(backbone).__name__} has no list of {count} decoder layers: smartmops needs a decoder-only text model; "
        "of a multimodal model pass the language model"
    )


class _NoPositions(nn.Module):
    """Stands in for learned positions in the upper half: the lower half has added them already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, self.width, device=ids.device)


def _view(backbone: Any, first: int, last: int, *, embed: bool, final: bool) -> Any:
    view = copy.copy(backbone)
    view._modules = dict(backbone._modules)
    config = copy.copy(backbone.config)
    name = layers_name(backbone)
    view._modules[name] = nn.ModuleList(getattr(backbone, name)[first:last])
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[first:last]
    config.num_hidden_layers = last - first
    view.config = config
    if not final:
        for norm in FINAL_NORMS:
            if norm in view._modules:
                view._modules[norm] = nn.Identity()
    for factor in SCALES:  # what enters these layers was multiplied when it was an embedding
        if not embed and isinstance(getattr(view, factor, None), float | int):
            setattr(view, factor, 1.0)
    if not embed and "wpe" in view._modules:
        view._modules["wpe"] = _NoPositions(config.hidden_size)
    return view


def lower(backbone: nn.Module, n: int) -> Any:
    """Decoder layers 0..n-1 without the final norm: its `last_hidden_state` is what enters layer n."""
    return _view(backbone, 0, n, embed=True, final=False)


def middle(backbone: nn.Module, first: int, last: int) -> Any:
    """Decoder layers `first`..`last` - 1: from `inputs_embeds`, what enters them, to `last_hidden_state`."""
    return _view(backbone, first, last, embed=False, final=False)


def layer(backbone: nn.Module, index: int) -> Any:
    """Decoder layer `index` alone: from `inputs_embeds`, what enters it, to `last_hidden_state`, what leaves it."""
    return middle(backbone, index, index + 1)


def upper(backbone: nn.Module, n: int) -> Any:
    """Decoder layers n.. with the final norm: `upper(inputs_embeds=lower(...)[0])` is the whole model."""
    return _view(backbone, n, len(getattr(backbone, layers_name(backbone))), embed=False, final=True)
