"""Text in, tokens out. Knows examples, files, templates and labels; knows no models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .example import Example, conversation

if TYPE_CHECKING:
    from .template import Rendered, render

__all__ = ["Example", "Rendered", "conversation", "render"]


def __getattr__(name: str) -> Any:
    """What needs transformers is imported when it is first asked for: who only reads files need not wait for it."""
    if name in ("Rendered", "render"):
        from . import template

        return getattr(template, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
