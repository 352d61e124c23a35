"""Examples in, token ids and labels out: chat templates, what of a text is the user's own, batches. Knows no models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .template import Rendered, render

__all__ = ["Rendered", "render"]


def __getattr__(name: str) -> Any:
    """What needs transformers is imported when it is first asked for: who only counts tokens need not wait for it."""
    if name in __all__:
        from . import template

        return getattr(template, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
