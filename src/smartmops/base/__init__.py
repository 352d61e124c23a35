"""A MODEL argument in, a frozen model and its tokenizer out: built in, a folder, a GGUF, or of the hub."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from smartmops.options.compression import Quantisation

from .names import local

if TYPE_CHECKING:
    from .gradient import check_gradient, dense_weight, quantised_linears
    from .load import describe, fast_dtype, load_base, quantised_as

__all__ = [
    "Quantisation",
    "check_gradient",
    "dense_weight",
    "describe",
    "fast_dtype",
    "load_base",
    "local",
    "quantised_as",
    "quantised_linears",
]
HOMES = {
    "check_gradient": "gradient", "dense_weight": "gradient", "quantised_linears": "gradient", "describe": "load",
    "fast_dtype": "load", "load_base": "load", "quantised_as": "load",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is first asked for: who only asks what a name means need not wait for it."""
    if name in HOMES:
        return getattr(import_module(f".{HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
