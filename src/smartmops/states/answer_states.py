"""What never changes where answers alone see experts: the cache before each answer, and the answer's hidden states.

Knows rows and a model; each row's states are computed when first asked for and kept while there is room, and those of
what many rows begin with once for all of them. A filled one is a collator, and its indices are the data set, as with
`ActivationCache`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from accelerate.utils import send_to_device
from jaxtyping import Float
from torch import Tensor

from smartmops.attention.packed import IGNORED, side_by_side
from smartmops.runs import ranks
from smartmops.tokens.batches import Encoded, by_budget, pack
from smartmops.tuner.states import Opening

from .activations import evaluating, free_memory
from .openings import LEAST, openings

T = TypeVar("T", dict[str, Tensor], Opening)
BLOCK = 16  # rows of each process whose states travel at once
SHARE = 0.4  # of the free memory that may be filled; of a GPU's memory, what must stay free


class AnswerStates:
    """States of `rows`, in their order; on the model's GPU while it has room, else in main memory.

    Attributes:
        room: Bytes that may be kept in main memory; None: as many as there are.
        kept: Bytes that are.
    """

    def __init__(
        self, model: Any, rows: Sequence[Encoded], room: int | None = None, budget: int = 1024, least: int = LEAST
    ) -> None:
        self.model, self.rows, self.budget = model, rows, budget
        self.shared = openings([_before_answer(row) for row in rows], least)
        free = free_memory()
        self.room = room if room is not None else None if free is None else int(SHARE * free / ranks.on_this_machine())
        self.kept = 0
        self._found: dict[int, dict[str, Tensor]] = {}
        self._read: dict[int, int | None] = {}  # the layer whose hidden states `pooled` of a kept row is the mean of
        self._opened: dict[int, tuple[int | None, Opening]] = {}  # kept, and the layer that `read` is of
        self._crowded = self.room == 0  # so that nothing more is begun with

    def __len__(self) -> int:
        return len(self.rows)

    def __call__(self, indices: Sequence[int]) -> dict[str, dict[str, Tensor]]:
        """The keyword arguments of the model's `forward` for these examples."""
        return {"packed": self.batch(indices, alone=True)}

    def batch(self, indices: Sequence[int], alone: bool = False) -> dict[str, Tensor]:
        """Headers and answers of these examples end to end, and what came before (see `packed.Packed`).

        States that are not there yet are computed with each row `alone` where one trains on them: beside others the
        last digits hang on which those are, and a run that goes on after a kill meets other rows first.

        Raises:
            IndexError: an index is none of the rows'.
        """
        if outside := [i for i in indices if not 0 <= i < len(self)]:
            raise IndexError(f"example {outside[0]} of {len(self)}: choose 0 to {len(self) - 1}")
        fresh = self._compute([i for i in dict.fromkeys(indices) if i not in self._found], alone)
        stored, device = [fresh[i] if i in fresh else self._found[i] for i in indices], self._device()
        begun = [self._begun(int(part["opening"])) for part in stored]
        parts: list[dict[str, Tensor]] = send_to_device(stored, device)
        pooled = {i: part["pooled"] for i, part in zip(indices, parts, strict=True)}
        if elsewhere := [i for i in pooled if i not in fresh and self._read.get(i) != self._layer()]:
            pooled |= {i: found.to(device) for i, found in self._instructions(elsewhere).items()}
        above = slice(self.model.base_model.layer().index, None)
        keys, values = (
            [([getattr(each, name)[above]] if each else []) + [part[f"past_{name}"]]
             for each, part in zip(begun, parts, strict=True)] for name in ("keys", "values")
        )  # fmt: skip
        return {
            "past_keys": side_by_side(keys),
            "past_values": side_by_side(values),
            "past_lengths": torch.tensor([sum(piece.shape[2] for piece in pieces) for pieces in keys]),
            "hidden": torch.cat([part["hidden"] for part in parts]),
            "labels": torch.cat([part["labels"] for part in parts]),
            "lengths": torch.tensor([len(part["labels"]) for part in parts]),
            "pooled": torch.stack([pooled[i] for i in indices]),
        }

    @property
    def pooled(self) -> Float[Tensor, "n inputs"]:
        """What the gate reads of each example, before standardisation."""
        return self.gate_inputs(range(len(self)))

    def gate_inputs(self, indices: Sequence[int]) -> Float[Tensor, "some inputs"]:
        """What the gate reads of these examples, before standardisation."""
        fresh = self._instructions([i for i in indices if i not in self._found or self._read[i] != self._layer()])
        return torch.stack([(fresh[i] if i in fresh else self._found[i]["pooled"]).cpu() for i in indices])

    def together(self) -> None:
        """Of several processes that train on the same rows: each computes its part, and all keep all that fit."""
        for number in range(len(self.shared.tokens)):
            self._opening(number)
        for first in range(0, len(self), BLOCK * ranks.world()):
            block = range(first, min(first + BLOCK * ranks.world(), len(self)))
            made = self._compute([i for i in ranks.part(block) if i not in self._found])
            for theirs in ranks.all_of(
                {i: send_to_device(made.get(i, self._found.get(i)), "cpu") for i in ranks.part(block)}
            ):
                for i in theirs.keys() - self._found.keys():
                    self._keep(i, send_to_device(theirs[i], self._device()))
            if all(ranks.all_of(any(i not in self._found for i in block))):
                return

    def _layer(self) -> int | None:
        """The layer that the gate of the model reads; None where nothing hangs on it."""
        config = self.model.base_model.layer().configs["default"]
        if config.gate_is_idle:
            return None
        layer: int | None = config.injection_layer if config.gate_layer is None else config.gate_layer
        return layer

    def _instructions(self, indices: Sequence[int]) -> dict[int, Tensor]:
        """What the gate reads of these rows, kept where their states are."""
        from .instructions import instructions

        if not indices:
            return {}
        if self._layer() is None:  # of no consequence
            return {i: self._found[i]["pooled"] if i in self._found else self._idle() for i in indices}
        with evaluating(self.model):
            found = instructions(self.model, [self.rows[i] for i in indices]).cpu()
        made = dict(zip(indices, found, strict=True))
        for i in set(indices) & self._found.keys():
            self._found[i]["pooled"], self._read[i] = made[i], self._layer()
        return made

    def _idle(self) -> Tensor:
        config = self.model.base_model.layer().configs["default"]
        return torch.zeros(config.embedding_size or config.base_hidden_size)

    def _compute(self, indices: Sequence[int], alone: bool = False) -> dict[int, dict[str, Tensor]]:
        """States of these rows, kept where there is room; each `alone`, or as many at once as `budget` allows."""
        made: dict[int, dict[str, Tensor]] = {}
        device = self._device()
        groups = [[k] for k in range(len(indices))] if alone else by_budget(
            [len(self.rows[i].input_ids) for i in indices], self.budget
        )  # fmt: skip
        with evaluating(self.model):
            for group in groups:
                chosen = [indices[k] for k in group]
                given = pack([self.rows[i] for i in chosen])
                numbers = [self.shared.of[i] for i in chosen]
                begun = [None if number is None else self._opening(number) for number in numbers]
                found = self.model.base_model.answers(send_to_device(given, device), send_to_device(begun, device))
                assert found.past_keys is not None and found.past_values is not None and found.past_lengths is not None
                ends = found.lengths.cumsum(0).tolist()
                for k, i in enumerate(chosen):
                    own = slice(ends[k] - int(found.lengths[k]), ends[k])
                    before = int(found.past_lengths[k])
                    part = {
                        "hidden": found.hidden[own], "labels": found.labels[own], "pooled": found.pooled[k],
                        "past_keys": found.past_keys[:, k, :, :before],
                        "past_values": found.past_values[:, k, :, :before],
                        "opening": torch.tensor(-1 if begun[k] is None else numbers[k]),  # of `shared.tokens`
                    }  # fmt: skip
                    made[i] = {name: value.clone() for name, value in part.items()}
                    self._keep(i, made[i])
        return made

    def _begun(self, number: int) -> Opening | None:
        """What a row begins with, on the model's device; None for a row that was computed whole."""
        if number < 0:
            return None
        found: Opening = send_to_device(self._opening(number) or self._opened_anew(number), self._device())
        return found

    def _opening(self, number: int) -> Opening | None:
        """What rows begin with, if it is kept or there is room for it; `read` is of the gate's present layer."""
        layer, found = self._opened.get(number, (None, None))
        if found is not None and layer == self._layer():
            return found
        if found is None and self._crowded:
            return None
        made = self._opened_anew(number)
        kept = self._placed(made) if found is None else found._replace(read=made.read.to(found.read.device))
        if kept is not None:
            self._opened[number] = self._layer(), kept
        self._crowded = kept is None
        return kept

    def _opened_anew(self, number: int) -> Opening:
        with evaluating(self.model):
            tokens = torch.tensor(self.shared.tokens[number], device=self._device())
            found: Opening = self.model.base_model.opening(tokens)
        return found

    def _keep(self, index: int, part: dict[str, Tensor]) -> None:
        if (kept := self._placed(part)) is not None:
            self._found[index], self._read[index] = kept, self._layer()

    def _placed(self, tensors: T) -> T | None:
        """These where there is room for them, on the GPU or in main memory; None where there is none."""
        every = tensors.values() if isinstance(tensors, dict) else tensors
        size = sum(value.numel() * value.element_size() for value in every)
        if self.room != 0 and _has_room(self._device(), size):
            return tensors
        if self.room is not None and self.kept + size > self.room:
            return None
        self.kept += size
        moved: T = send_to_device(tensors, "cpu")
        return moved

    def _device(self) -> torch.device:
        found: torch.device = next(self.model.parameters()).device
        return found


def _before_answer(row: Encoded) -> list[int]:
    """Tokens before the header of the answer; none of a row without an answer."""
    first = next((i for i, label in enumerate(row.labels) if label != IGNORED), 0)
    return row.input_ids[: max(first - max(row.header, 1), 0)]


def _has_room(device: torch.device, size: int) -> bool:
    """Whether a GPU can take so many bytes more and leave enough for the training itself; False of any other device."""
    if device.type != "cuda":
        return False
    free, total = torch.cuda.mem_get_info(device)
    return free - size > SHARE * total
