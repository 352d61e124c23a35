"""What a kind of experts is: something that puts the columns of its prompts in front of layers, as far as a gate opens.

The paper's kind is prompts that run through the layers (hidden_states.py), the other kind is keys and values of every
layer (keys_values.py). Knows no parameters, no text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from smartmops.attention.context import ForwardContext


@dataclass
class Opened:
    """How far the gate opens the columns to each row of a batch."""

    bias: Float[Tensor, "rows prompts"]  # on attention logits over the experts' columns
    shared: Float[Tensor, "rows shared"]  # on those over the columns that all experts share
    strength: Float[Tensor, " rows"]  # what is not left to the base
    scale: Float[Tensor, "rows prompts"] | None = None  # of the prompts' hidden states, before every layer


@runtime_checkable
class Experts(Protocol):
    """One adapter's experts."""

    def put(self, context: ForwardContext, opened: Opened) -> None:
        """Put their columns, and the shared ones, in front of the injection layer and all later ones."""
