"""Views of parts of one backbone (lower half, upper half, one layer), sharing every weight. No prompts, no adapters."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from smartmops.checks.errors import BaseModelError

SCALES = ("embedding_multiplier", "embed_scale", "embedding_scale", "scale_emb")  # Granite's name, and other models'
FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "layer_norm")
POSITIONS = ("wpe", "embed_positions")  # added to embeddings (GPT-2's name, and OPT's)


def backbone_of(model: Any) -> Any:
    """The module that holds decoder layers and final norm; OPT keeps it one floor below where others do."""
    found = model.base_model
    count = getattr(found.config, "num_hidden_layers", None)
    inner: Any = getattr(found, "decoder", None)
    plain = inner is not None and [*found.children()] == [inner]
    held = (child for child in inner.children() if isinstance(child, nn.ModuleList)) if plain else ()
    return inner if any(len(each) == count for each in held) else found


def in_its_place(model: Any, backbone: nn.Module) -> nn.Module:
    """What stands at `model.base_model_prefix` of a copy of `model` whose `backbone_of` is to be `backbone`."""
    if backbone_of(model) is model.base_model:
        return backbone
    outer = copy.copy(model.base_model)
    own_forward(outer)
    outer._modules = {"decoder": backbone}
    return outer  # type: ignore[no-any-return]


def own_forward(copied: nn.Module) -> None:
    """Give a shallow copy of a module a `forward` of its own, where one on the instance is bound to what was copied.

    accelerate's hooks put such a one there; those of the parts of the copy go on bringing weights to where they run.
    """
    held = copied.__dict__
    forward = held.pop("forward", None)
    forward = held.pop("_old_forward", forward)
    function = getattr(forward, "__func__", forward)
    if function is not None and function is not type(copied).forward:
        held["forward"] = types.MethodType(function, copied)


def runs_on(part: nn.Module) -> torch.device | None:
    """Where accelerate's hooks bring weights to run that wait elsewhere; None: there are no such hooks."""
    for module in part.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            if getattr(each, "execution_device", None) is not None:
                return torch.device(each.execution_device)
    return None


def device_of(backbone: Any) -> torch.device:
    """Where the backbone takes tokens, also where its embeddings wait elsewhere until they run."""
    table = backbone.get_input_embeddings()
    found: torch.device = table.weight.device
    return (runs_on(table) if table.weight.is_meta else None) or found


def hidden_size(backbone: Any) -> int:
    """Width of the hidden states."""
    return int(backbone.config.get_text_config().hidden_size)


def layers_name(backbone: Any) -> str:
    """The attribute that holds the decoder layers.

    Raises:
        BaseModelError: there is none, so this is no plain decoder-only backbone.
    """
    count = getattr(backbone.config, "num_hidden_layers", None)
    for name, child in backbone.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return str(name)
    kind = type(backbone).__name__
    parts = [
        name for name, child in backbone.named_children() if any(isinstance(m, nn.ModuleList) for m in child.modules())
    ]
    if parts:
        raise BaseModelError(f"{kind} keeps its layers in {' and '.join(parts)}, not in one list of decoder layers: "
                             "give the language model alone if it is a multimodal model, else choose a decoder-only "
                             "architecture, such as Llama")  # fmt: skip
    raise BaseModelError(
        f"{kind} has no list of {count} decoder layers: choose a decoder-only architecture, such as Llama"
    )


class _NoPositions(nn.Module):
    """Stands in for positions that are added to embeddings: what enters these layers has had them already."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        ids: Any = kwargs.get("position_ids", args[0] if args else None)
        return torch.zeros((), device=ids.device)  # without dimensions it changes neither shape nor precision


def _view(backbone: Any, first: int, last: int, *, embed: bool, final: bool) -> Any:
    view = copy.copy(backbone)
    own_forward(view)
    view._forward_pre_hooks, view._forward_hooks = OrderedDict(), OrderedDict()  # they wait for passes of text
    view._modules = dict(backbone._modules)
    config = copy.copy(backbone.config)
    name = layers_name(backbone)
    view._modules[name] = nn.ModuleList(getattr(backbone, name)[first:last])
    types = getattr(config, "layer_types", None)
    config.num_hidden_layers = last - first
    if types and list(config.layer_types) != list(types[first:last]):  # some configs work them out from the number
        config.layer_types = types[first:last]
    view.config = config
    if not final:
        for norm in FINAL_NORMS:
            if norm in view._modules:
                view._modules[norm] = nn.Identity()
        _leave_out(view, "project_out")
    for factor in SCALES:  # what enters these layers was multiplied when it was an embedding
        if not embed and isinstance(getattr(view, factor, None), float | int):
            setattr(view, factor, 1.0)
    if not embed:
        _leave_out(view, "project_in")
        for part, child in list(view._modules.items()):
            if part in POSITIONS:
                view._modules[part] = _NoPositions()
            elif isinstance(child, nn.Dropout):  # of embeddings
                view._modules[part] = nn.Identity()
    return view


def _leave_out(view: Any, part: str) -> None:
    if view._modules.get(part) is not None:
        view._modules[part] = None


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
