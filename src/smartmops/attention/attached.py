"""Routes the attention of decoder layers through `attention.gated_prefix_attention`, and takes it off again.

Knows layers, their classes and transformers' attention registry. Knows no gate, no experts, no tokens.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from smartmops.checks.errors import BaseModelError

from . import attention
from .context import ForwardContext
from .kernels import Native


def attention_modules(layer: nn.Module) -> Iterator[Any]:
    """The self-attention modules of a decoder layer that ask the registry."""
    for module in layer.modules():
        named = (
            type(module).__name__.endswith("Attention") and hasattr(module, "config") and hasattr(module, "layer_idx")
        )
        if named and hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS"):
            yield module


def _eager(module: nn.Module) -> Any:
    """The attention that a module's own file computes step by step, if it has one."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def check(layer: nn.Module, number: int) -> None:
    """Whether `attach` can serve the layer, the one with this number (from 0).

    Raises:
        BaseModelError: it has no attention, or one that does not ask the registry, or an implementation that cannot
            carry a bias per row.
    """
    modules = list(attention_modules(layer))
    kind = type(layer).__name__
    if not modules and not any("Attention" in type(module).__name__ for module in layer.modules()):
        mixers = [type(child).__name__ for name, child in layer.named_children() if not _no_mixer(name, child)]
        raise BaseModelError(
            f"layer {number}, a {kind}, mixes tokens by {' and '.join(mixers) or 'no module of its own'}, "
            "not by attention over keys and values, where alone prompts have a place: choose an "
            "architecture with attention in every layer, such as Llama"
        )
    if not modules:
        raise BaseModelError(f"layer {number}, a {kind}, does not use transformers' attention registry (nor do Falcon, "
                             "Bloom and MPT): choose another architecture, such as Llama")  # fmt: skip
    for module in modules:
        eager = _eager(module)
        if eager is not None and "position_bias" in inspect.signature(eager).parameters:
            raise BaseModelError(
                f"layer {number}, a {kind}, adds a bias of each query's distance to each key, and "
                "prompts stand at no distance: choose another architecture, such as Llama"
            )
        attention.refuse(module.config._attn_implementation)


def refuse_changed(layer: Any) -> None:
    """Refuse what `check` does of an attached layer too: a model can be given another implementation at any time.

    Raises:
        BaseModelError: it was given one that cannot carry a bias per row.
    """
    for module in layer.mops_attention:
        attention.refuse(module.mops_native.used)


def _no_mixer(name: str, child: nn.Module) -> bool:
    """Whether a part of a layer leaves every token to itself."""
    words = ("norm", "mlp", "feed_forward", "ffn", "moe", "dropout")
    return any(word in name.lower() or word in type(child).__name__.lower() for word in words)


def attach(layer: Any) -> None:
    """Route the layer's attention through `gated_prefix_attention`; without a `mops` keyword nothing changes."""
    layer.mops_attention = modules = list(attention_modules(layer))
    for module in modules:
        if not hasattr(module, "mops_native"):
            module.mops_native = Native(_eager(module), module.config)
            module.config = copy.copy(module.config)
            module.config._attn_implementation_internal = attention.NAME
    if not hasattr(layer, "mops_kind"):
        _become(layer, _handing_over(type(layer)))  # type: ignore[arg-type]


def _become(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Give the layer another class, also where an instance's own `forward` hides that of the class.

    accelerate's hooks put such a one there, which calls what it found as `_old_forward`.
    """
    was, own = type(layer), layer.__dict__
    layer.__class__ = kind
    for name in ("_old_forward", "forward"):
        found = own.get(name)
        if getattr(found, "__func__", None) is was.forward:
            own[name] = types.MethodType(kind.forward, layer)
        elif isinstance(found, functools.partial) and found.func is _handed_over:
            own[name] = found.args[0]
    name = "_old_forward" if "_old_forward" in own else "forward"
    if hasattr(kind, "mops_kind") and name in own and getattr(own[name], "__func__", None) is not kind.forward:
        own[name] = functools.partial(_handed_over, own[name], layer)


def _handed_over(
    forward: Callable[..., Any], layer: Any, *args: Any, mops: ForwardContext | None = None, **kwargs: Any
) -> Any:
    """Run a layer's `forward` with its `mops` keyword left where its attention modules look for it."""
    if mops is not None:
        args, kwargs = _arriving(int(layer.mops_attention[0].layer_idx), mops, args, kwargs)
    token = attention.now.set(mops)
    try:
        return forward(*args, **kwargs)
    finally:
        attention.now.reset(token)


@functools.cache
def _handing_over(kind: type[nn.Module]) -> type[nn.Module]:
    """The layer's class, whose `forward` leaves its `mops` keyword for its attention modules while it runs.

    A hook would not do: gradient checkpointing runs `forward` again, without hooks and after other passes.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _handed_over(functools.partial(kind.forward, self), self, *args, **kwargs)

    def reduced(self: nn.Module, protocol: Any) -> Any:
        return _again, (kind,), self.__dict__.copy()

    names = {"forward": forward, "mops_kind": kind, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), names | {"__reduce_ex__": reduced})


def _again(kind: type[nn.Module]) -> nn.Module:
    """An empty layer to be filled by pickle or copy, which find a class by its name and so find the plain one."""
    made = _handing_over(kind)  # type: ignore[arg-type]
    return made.__new__(made)


def _arriving(
    layer: int, context: ForwardContext, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What enters a layer: Algorithm 1 scales prompt columns there, and below the injection layer text has no graph."""
    if context.reading is not None:
        args, kwargs = context.reading.arriving(layer, (args, kwargs))
    scale = context.scale
    if scale is None and not (layer < context.injection_layer and torch.is_grad_enabled()):
        return args, kwargs
    hidden = args[0] if args else kwargs["hidden_states"]
    hidden = hidden.detach() if scale is None else hidden * scale
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def detach(layer: nn.Module) -> None:
    """Undo `attach`."""
    for module in attention_modules(layer):
        if hasattr(module, "mops_native"):
            module.config = module.mops_native.config
            del module.mops_native
    if hasattr(layer, "mops_attention"):
        del layer.mops_attention
    _become(layer, getattr(layer, "mops_kind", type(layer)))
