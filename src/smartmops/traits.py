"""The methods: what each of them is, does and is called, in one table.

Knows no options and no model, and imports nothing that takes time to import, so that options can be parsed by it. The
room of methods builds an adapter from an entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Traits:
    """One method.

    Attributes:
        label: What tables call it.
        adapter: The kind of PEFT config that it takes.
        gate: What weighs the experts: scores that are `learned` before and in training; the `highest` of such scores
            alone, which only training teaches; `even` weights; the one expert that belongs to the `task` of a row, or
            to the `nearest` cluster; `none`.
        rate: Of Adam; None: relative to the size of what is trained.
        federated: What `federate` calls it, and its label there; None where it is not offered.
        compared: What a comparison calls it, and its label there; None where it is as everywhere.
        colour: In figures; None: any.
        series: Of the colours of a report, the one that is its own; None: none.
    """

    label: str
    adapter: Literal["mops", "prompts", "lora", "ia3"] = "mops"
    gate: Literal["learned", "highest", "even", "task", "nearest", "none"] = "none"
    rate: float | None = None
    federated: tuple[str, str] | None = None
    compared: tuple[str, str] | None = None
    colour: str | None = None
    series: int | None = None

    @property
    def ours(self) -> bool:
        """Whether its experts enter at the injection layer, so that the states of the frozen half below serve it."""
        return self.adapter == "mops"

    @property
    def learned(self) -> bool:
        """Whether its gate is taught before training, so that it can leave text to the base."""
        return self.gate == "learned"

    @property
    def reads(self) -> bool:
        """Whether it has a gate that reads the model's own states, or those of an embedder."""
        return self.gate in ("learned", "highest", "even")

    @property
    def told(self) -> bool:
        """Whether its rows say which expert to use: a mark for tables, which answers nobody."""
        return self.gate in ("task", "nearest")

    @property
    def by_task(self) -> bool:
        """Whether each expert is meant for a task of the data."""
        return self.reads or self.gate == "task"

    @property
    def one_expert(self) -> bool:
        """Whether a single expert answers."""
        return self.told or self.gate == "highest"

    @property
    def answers(self) -> bool:
        """Whether it answers a question that comes with nothing but its text; PEFT pads prompts at the input away."""
        return self.adapter != "prompts" and not self.told


METHODS = {  # in the order in which they stand in tables
    "prompt-tuning": Traits("Prompt tuning", federated=("fedprompt", "FedPrompt"),
                            compared=("ungated", "Ungated prompts"), colour="#8a8a8a", series=2),
    "input-prompt-tuning": Traits("Prompts at the input", "prompts", rate=0.03,
                                  compared=("input_prompts", "Prompts at the input")),
    "ia3": Traits("IA3", "ia3", rate=1e-2, series=6),
    "lora": Traits("LoRA", "lora", rate=2e-3, federated=("fedlora", "FedLoRA"), colour="#009e73", series=5),
    "uniform-gate": Traits("Even gate", gate="even"),
    "oracle": Traits("Task told", gate="task"),
    "nearest-cluster": Traits("Nearest cluster", gate="nearest"),
    "top-1": Traits("Top-1 gate", gate="highest"),
    "mops": Traits("MoPs", gate="learned", federated=("mops", "MoPs"), colour="#0072b2", series=3),
}  # fmt: skip
PROPOSED = next(name for name, each in METHODS.items() if each.learned)  # what runs and tables are about
BASELINE = next(name for name, each in METHODS.items() if each.ours and each.gate == "none")  # held against it
CENTRAL = {each.federated[0]: name for name, each in METHODS.items() if each.federated}  # by what `federate` says
NAMED = [
    (each, name, label)
    for own, each in METHODS.items()
    for name, label in ((own, each.label), *filter(None, (each.compared, each.federated)))
]  # with all that runs and comparisons call them
LABELS = {name: label for _, name, label in NAMED}
BY_NAME = {name: each for each, name, _ in NAMED}


def compared(method: str) -> str:
    """What a comparison calls it."""
    names = METHODS[method].compared
    return names[0] if names else method


def is_told(method: str | None) -> bool:
    """Whether a run's method, if it has one that is known, is told which expert to use."""
    return method in METHODS and METHODS[str(method)].told
