"""What the frozen half makes of rows, found once for every method, seed and client on a base: in memory, on disk or
not at all, chosen by size.

Knows which states serve which adapter and rows, and where there is room for them. Knows no loop and no parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from smartmops.progress.bars import console
from smartmops.runs import ranks
from smartmops.tokens.batches import Encoded, packed
from smartmops.tuner import MoPsModel
from smartmops.tuner.engine import Engine

from .activations import ActivationCache, free_memory
from .answer_states import AnswerStates
from .fingerprint import add_rows, digest, what_the_gate_reads
from .instructions import instructions

Kept = ActivationCache | AnswerStates


class States:
    """States of the frozen half, under keys of all that they depend on.

    In memory that is the base that is at hand (whose weights never change), the injection layer, the recovery prompts'
    content, what the gate reads, and the content of the rows: every token, label, mask and embedding, so text, template
    and truncation. Files on disk outlive the base at hand, so their key holds its content too (`fingerprint`).

    Args:
        where: `memory`, `off`, a folder, or `auto`: in memory where they take a quarter of what is free at most.
    """

    def __init__(self, where: str = "auto") -> None:
        self.where = where
        self.found: dict[Any, Any] = {}  # what was worked out about base and rows, once for all
        self._texts: dict[int, tuple[Sequence[Encoded], bytes]] = {}  # holding rows, lest others take their identity

    def of(self, model: Any, rows: Sequence[Encoded]) -> Kept | None:
        """States of these rows for a model of ours; None where they are off or there is no room.

        Of several adapters with the same states, the one that asked last is the one that `AnswerStates` reads.
        """
        answers = model.base_model.layer().configs["default"].visible_to == "answers"
        key = ("states", *self._key(model, rows, not answers))
        if key not in self.found:
            self.found[key] = self._answers(model, rows) if answers else self._below(model, rows)
        found: Kept | None = self.found[key]
        if isinstance(found, AnswerStates):
            found.model = model
        return found

    def feed(
        self, model: Any, rows: Sequence[Encoded], collator: Callable[[Sequence[Any]], dict[str, Any]]
    ) -> tuple[Sequence[Any], Callable[[Sequence[Any]], dict[str, Any]]]:
        """A data set and its collator for training: ours train on examples end to end, from the injection layer up."""
        if not isinstance(model.base_model, MoPsModel):
            return rows, collator
        found = self.of(model, rows)
        return (rows, packed) if found is None else (range(len(found)), found)

    def read(self, model: Any, rows: Sequence[Encoded]) -> Float[Tensor, "n inputs"]:
        """What the gate reads of these rows' instructions, before standardisation."""
        key = ("read", *self._key(model, rows))
        if key not in self.found:
            self.found[key] = instructions(model, rows).cpu()
        found: Tensor = self.found[key]
        return found.to(model.device)

    def pooled(self, model: Any, rows: Sequence[Encoded]) -> Float[Tensor, "n inputs"]:
        """`read`, of rows whose states are wanted anyway."""
        found = self.of(model, rows)
        return instructions(model, rows) if found is None else found.pooled.to(model.device)

    def clear(self) -> None:
        """Forget everything that is in memory."""
        self.found.clear()
        self._texts.clear()

    def texts(self, rows: Sequence[Encoded]) -> bytes:
        """A digest of the rows' content."""
        if id(rows) not in self._texts:
            total = blake2b(digest_size=16)
            add_rows(total, rows, embedded=True)
            self._texts[id(rows)] = rows, total.digest()
        return self._texts[id(rows)][1]

    def _key(self, model: Any, rows: Sequence[Encoded], one_layer: bool = True) -> tuple[Any, ...]:
        """For one layer that the gate reads, or for any, where states look to that themselves."""
        layer = model.base_model.layer()
        config = layer.configs["default"]
        recovery = digest(layer.mops_recovery["default"]) if config.num_recovery_prompts else None
        return (Engine.on(model.base_model.model).backbone, config.injection_layer, recovery, config.visible_to,
                what_the_gate_reads(config)[not one_layer :], self.texts(rows))  # fmt: skip

    def _answers(self, model: Any, rows: Sequence[Encoded]) -> AnswerStates:
        if self.where not in ("auto", "memory", "off"):
            console.print(f"--activations {self.where}: states of answers are kept in memory, not on disk")
        return AnswerStates(model, rows, 0 if self.where == "off" else None)

    def _below(self, model: Any, rows: Sequence[Encoded]) -> ActivationCache | None:
        if self.where == "off":
            return None
        if self.where == "auto":
            need, free = ranks.on_this_machine() * ActivationCache.size(model, rows), free_memory()
            if free is not None and need > free / 4:
                console.print(
                    f"activations would take {need / 2**30:.1f} GiB, over a quarter of the {free / 2**30:.1f} GiB of "
                    "free memory, so the lower half runs in every step; --activations DIR keeps them on disk"
                )
                return None
        return ActivationCache.fill(model, rows, None if self.where in ("auto", "memory") else Path(self.where))
