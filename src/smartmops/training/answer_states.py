"""What never changes where answers alone see experts: the cache before each answer, and the answer's hidden states.

Knows rows and a model; each row's states are computed when first asked for and kept while there is room. A filled one
is a collator, and its indices are the data set, as with `ActivationCache`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from smartmops.data.batches import Encoded, by_budget, pack

from .activations import evaluating, free_memory

SHARE = 0.4  # of the free memory that may be filled


class AnswerStates:
    """States of `rows`, in their order.

    Attributes:
        room: Bytes that may be kept; None: as many as there are.
        kept: Bytes that are.
    """

    def __init__(self, model: Any, rows: Sequence[Encoded], room: int | None = None, budget: int = 1024) -> None:
        self.model, self.rows, self.budget = model, rows, budget
        free = free_memory()
        self.room = room if room is not None else None if free is None else int(SHARE * free)
        self.kept = 0
        self._found: dict[int, dict[str, Tensor]] = {}
        self._pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __call__(self, indices: Sequence[int]) -> dict[str, dict[str, Tensor]]:
        """The keyword arguments of the model's `forward` for these examples."""
        return {"packed": self.batch(indices)}

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Headers and answers of these examples end to end, and what came before (see `packed.Packed`).

        Raises:
            IndexError: an index is none of the rows'.
        """
        if outside := [i for i in indices if not 0 <= i < len(self)]:
            raise IndexError(f"example {outside[0]} of {len(self)}: choose 0 to {len(self) - 1}")
        fresh = self._compute([i for i in dict.fromkeys(indices) if i not in self._found])
        parts = [fresh[i] if i in fresh else self._found[i] for i in indices]
        lengths = torch.tensor([part["past_keys"].shape[2] for part in parts])
        joined = {
            name: torch.nn.utils.rnn.pad_sequence([part[name].permute(2, 0, 1, 3) for part in parts], batch_first=True)
            .permute(2, 0, 3, 1, 4)
            .contiguous()
            for name in ("past_keys", "past_values")
        }
        return joined | {
            "hidden": torch.cat([part["hidden"] for part in parts]),
            "labels": torch.cat([part["labels"] for part in parts]),
            "lengths": torch.tensor([len(part["labels"]) for part in parts]),
            "pooled": torch.stack([part["pooled"] for part in parts]),
            "past_lengths": lengths,
        }

    @property
    def pooled(self) -> Float[Tensor, "n inputs"]:
        """What the gate reads of each example, before standardisation."""
        return self.gate_inputs(range(len(self)))

    def gate_inputs(self, indices: Sequence[int]) -> Float[Tensor, "some inputs"]:
        """What the gate reads of these examples, before standardisation."""
        missing = [i for i in indices if i not in self._found]
        fresh: dict[int, Tensor] = {}
        if missing:
            from .pretrain import instructions

            with evaluating(self.model):
                fresh = dict(zip(missing, instructions(self.model, [self.rows[i] for i in missing]).cpu(), strict=True))
        return torch.stack([fresh[i] if i in fresh else self._found[i]["pooled"] for i in indices])

    def _compute(self, indices: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        """States of these rows; kept where there is room."""
        made: dict[int, dict[str, Tensor]] = {}
        device = next(self.model.parameters()).device
        with evaluating(self.model):
            for group in by_budget([len(self.rows[i].input_ids) for i in indices], self.budget):
                chosen = [indices[k] for k in group]
                given = pack([self.rows[i] for i in chosen])
                found = self.model.base_model.answers({name: value.to(device) for name, value in given.items()})
                assert found.past_keys is not None and found.past_values is not None and found.past_lengths is not None
                ends = found.lengths.cumsum(0).tolist()
                for k, i in enumerate(chosen):
                    own = slice(ends[k] - int(found.lengths[k]), ends[k])
                    before = int(found.past_lengths[k])
                    part = {
                        "hidden": found.hidden[own], "labels": found.labels[own], "pooled": found.pooled[k],
                        "past_keys": found.past_keys[:, k, :, :before],
                        "past_values": found.past_values[:, k, :, :before],
                    }  # fmt: skip
                    made[i] = {name: value.clone().cpu() for name, value in part.items()}
                    self._keep(i, made[i])
        return made

    def _keep(self, index: int, part: dict[str, Tensor]) -> None:
        size = sum(value.numel() * value.element_size() for value in part.values())
        if self.room is None or self.kept + size <= self.room:
            self._found[index] = part
            self.kept += size
