"""The embedded base: a 6 M-parameter Llama pretrained to read its task and style from context (see base/README.md)."""

from __future__ import annotations

from pathlib import Path

BASE = Path(__file__).parent / "base"


def resolve(model: str) -> str:
    """The folder or hub id behind a MODEL argument: `tiny` is the embedded base, anything else is itself."""
    return str(BASE) if model == "tiny" else model
