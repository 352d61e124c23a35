"""Text in, tokens out. Knows examples, files, templates and labels; knows no models."""

from .example import Example, conversation
from .template import Rendered, render

__all__ = ["Example", "Rendered", "conversation", "render"]
