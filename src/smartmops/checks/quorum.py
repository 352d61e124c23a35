"""The end of a run that too few clients answer. Apart, so that a command can tell it from other errors at no cost."""

from __future__ import annotations


class QuorumLost(RuntimeError):
    """Too few clients answered, again and again. The last whole round is in the checkpoint."""
