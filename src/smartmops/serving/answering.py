"""Questions in, answers out: what is asked of a run, how it is put to its model, and what comes back.

Knows a run's model, its template and its experts. Knows no terminal, no queue, no HTTP, and not how tokens are made.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from smartmops.calls.mixed import BASE
from smartmops.checks.errors import ConfigError, DataError, RunError
from smartmops.evaluation.perplexity import left_to_answer
from smartmops.experts.gate import by_expert
from smartmops.methods.baselines import load_run, template_of
from smartmops.reading.embedder import Embedder, of_run
from smartmops.rows.example import Example
from smartmops.tokens.batches import padded
from smartmops.tokens.parts import Prompt
from smartmops.tokens.template import Template
from smartmops.traits import is_told
from smartmops.tuner import MoPsModel


@dataclass(frozen=True)
class Settings:
    """How one answer is chosen, and where it ends."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: always the most likely token
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()  # texts at which an answer ends, and which are no part of it
    logprobs: int | None = None  # most likely tokens to tell beside each one that was chosen; None: tell nothing


@dataclass(frozen=True)
class Likely:
    """A token of an answer, and how likely the model thought it, before temperature and `top_p`."""

    token: str
    logprob: float  # natural
    top: tuple[tuple[str, float], ...]  # the most likely tokens at this place, the most likely one first


@dataclass(frozen=True)
class Answer:
    """What was answered, and by whom."""

    text: str
    tokens: int  # generated, the one that ends the turn included
    ended: str  # "stop", "length" or "cancelled"
    weights: dict[str, float]  # of the gate, by expert
    left_to_base: float  # the weight that went to no expert
    likely: tuple[Likely, ...] | None = None  # of its tokens, without one that ends the turn; None: not asked for


@dataclass(eq=False)
class Question:
    """A prompt, and who wants to know; made by `Answerer.ask` or `Answerer.complete`."""

    prompt: Prompt
    read: str  # by an embedder, where the gate has one
    settings: Settings = Settings()
    expert: str | None = None  # answers alone; None: the gate decides
    base: bool = False  # no expert answers
    weights: tuple[float, ...] | None = None  # of the experts, in place of the gate's; sum to one
    whole: bool = False  # blanks around the answer belong to it
    on_text: Callable[[str], Any] = field(default=lambda piece: None)  # called as the text comes
    on_end: Callable[[Answer], Any] = field(default=lambda answer: None)
    cancelled: bool = False  # set by whoever does not want to know any more


@runtime_checkable
class Answers(Protocol):
    """Whoever answers: an `Answerer`, or what stands in for one."""

    experts: Sequence[str]
    tasks: Mapping[str, Mapping[str, float]]  # of an expert, the share of each task's gate that it has; may be empty

    def ask(self, example: Example, settings: Settings, **who: Any) -> Question:
        """A question in a template."""

    def complete(self, text: str, settings: Settings, **who: Any) -> Question:
        """A text to go on with."""

    def slots(self) -> Any:
        """An empty batch that questions may join."""


class Answerer:
    """A run that answers. Calls from several threads take turns."""

    def __init__(self, model: Any, tokenizer: Any, template: Template, embedder: Embedder | None = None) -> None:
        self.model, self.tokenizer, self.template, self._embedder = model, tokenizer, template, embedder
        self._config = model.peft_config["default"]
        self.experts: Sequence[str] = self._config.named_experts
        self.tasks: Mapping[str, Mapping[str, float]] = {}
        self.stops = template.stops(model)
        self.turn = threading.Lock()

    @classmethod
    def open(cls, path: Path) -> Answerer:
        """The answerer of a run folder.

        Raises:
            RunError: the run has no experts, or is told which of them to use; its base or embedder have changed.
        """
        model, tokenizer, run = load_run(path)
        method = run.config["arguments"].get("method")
        if is_told(method) or not isinstance(model.base_model, MoPsModel):
            why = "is told which expert to use" if is_told(method) else "has no experts"
            raise RunError(f"{path} was trained with method {method!r}, which {why}: give a run of --method mops")
        named = model.peft_config["default"].embedder
        embedder = of_run(run, named) if named else None
        found = cls(model, tokenizer, Template.of(template_of(run), tokenizer), embedder)
        found.tasks = tasks_of(run.read_gates() or {}, found.experts)
        return found

    def ask(self, example: Example, settings: Settings, **who: Any) -> Question:
        """A question in the run's template, with the turns before it.

        Raises:
            DataError: it does not fit into the model's positions, or there is no such expert.
        """
        (prompt,) = self.template.prompts([example.turns()])
        return self._question(prompt, example.instruction, settings, who)

    def complete(self, text: str, settings: Settings, **who: Any) -> Question:
        """A text to go on with as it stands.

        Raises:
            DataError: as `ask`, or the text is empty.
        """
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        if ids and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()  # some tokenizers end every text with it
        if not text or not ids:
            raise DataError("the prompt is empty: give a text to go on with")
        return self._question(Prompt(ids, [1] * len(ids), 0), text, settings, {"whole": True, **who})

    def _question(self, prompt: Prompt, read: str, settings: Settings, who: dict[str, Any]) -> Question:
        left_to_answer(self.model, len(prompt.input_ids))
        if (expert := who.get("expert")) is not None and expert not in self.experts:
            raise ConfigError(f"{expert!r} is no expert of this run: choose one of {', '.join(self.experts)}")
        return Question(prompt, read, settings, **who)

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer all questions in one batch, each as if it were alone.

        Raises:
            Exception: what a question failed with.
        """
        slots = self.slots()
        spoken = slots.join(questions)
        while slots.spoken:
            slots.step()
        for each in spoken:
            if each.fault is not None:
                raise each.fault
        return [each.end("length") for each in spoken]

    def slots(self) -> Any:
        """An empty batch that questions may join at any token (`slots.Slots`)."""
        from .slots import Slots

        return Slots(self)

    @property
    def pad(self) -> int:
        """The token that fills up shorter rows."""
        found = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if found is None else found)

    def batch(self, questions: Sequence[Question]) -> dict[str, Any]:
        """Prompts padded on the left, and what the gate is told of them."""
        ids = [question.prompt.input_ids for question in questions]
        masks = [question.prompt.gate_mask for question in questions]
        batch: dict[str, Any] = {
            "input_ids": padded(ids, self.pad, "left"),
            "attention_mask": padded([[1] * len(row) for row in ids], 0, "left"),
        }
        if all(mask is not None for mask in masks):
            batch["gate_mask"] = padded([mask or [] for mask in masks], 0, "left")
        if self._embedder is not None:
            batch["gate_embedding"] = torch.tensor(self._embedder([question.read for question in questions]))
        if any(question.expert is not None or question.weights is not None for question in questions):
            batch["gate_weights"] = torch.tensor([self._told(question) for question in questions])
        batch = {name: value.to(self.model.device) for name, value in batch.items()}
        if any(question.base for question in questions):
            batch["adapter_names"] = [BASE if question.base else "default" for question in questions]
        return batch

    def _told(self, question: Question) -> list[float]:
        """Weights of a caller, or all weight on one expert; NaN: the gate decides."""
        if question.weights is not None:
            return list(question.weights)
        expert = question.expert
        return [float("nan") if expert is None else float(name == expert) for name in self.experts]

    def weights(self, rows: int) -> list[tuple[dict[str, float], float]]:
        """Of the latest pass, each row's weights by expert, and what was left to the base."""
        gate, lost = self.model.base_model.last_gate, self.model.base_model.last_null
        if gate is None or not gate.shape[1]:
            return [({}, 1.0)] * rows
        left = torch.zeros(rows) if lost is None else lost
        pairs = zip(by_expert(gate, self._config.num_experts).tolist(), left.tolist(), strict=True)
        return [({name: round(weight, 4) for name, weight in zip(self.experts, row, strict=True)}, round(each, 4))
                for row, each in pairs]  # fmt: skip


def tasks_of(gates: Mapping[str, Any], experts: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of each expert, what the gate gave it of each task after training, the largest first; empty if a run kept none.

    Args:
        gates: What `gates.json` of a run holds.
        experts: The names that its adapter has now.
    """
    if list(gates.get("experts") or []) != list(experts):
        return {}
    after = gates.get("after") or gates.get("during") or {}
    found = {name: {task: round(float(row[at]), 4) for task, row in after.items()} for at, name in enumerate(experts)}
    return {name: dict(sorted(tasks.items(), key=lambda pair: -pair[1])) for name, tasks in found.items() if tasks}
