"""Examples in, padded batches of token ids out. Knows templates and labels; knows no models."""

from __future__ import annotations

from .example import Example


def prompt_text(example: Example) -> str:
    """Everything before the response, as the model reads it."""
    context = f"\n\n### Context:\n{example.context}" if example.context else ""
    return f"### Instruction:\n{example.instruction}{context}\n\n### Response:\n"
