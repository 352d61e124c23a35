"""Questions in, answers out, several at once, token by token: each row of a batch has its own settings and end.

Knows a run's model, its template and its experts. Knows no terminal, no queue, no HTTP.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from smartmops.calls.mixed import BASE
from smartmops.evaluation.perplexity import room
from smartmops.experts.gate import by_expert
from smartmops.methods.baselines import load_run, template_of
from smartmops.options.method import TOLD
from smartmops.preparing.embedder import Embedder
from smartmops.rows.example import Example
from smartmops.tokens.batches import padded
from smartmops.tokens.parts import Prompt
from smartmops.tokens.template import Template
from smartmops.tuner import MoPsModel

HALF = "\ufffd"  # what a tokenizer makes of a character whose last bytes are still to come


@dataclass(frozen=True)
class Settings:
    """How one answer is chosen, and where it ends."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: always the most likely token
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()  # texts at which an answer ends, and which are no part of it


@dataclass(frozen=True)
class Answer:
    """What was answered, and by whom."""

    text: str
    tokens: int  # generated, the one that ends the turn included
    ended: str  # "stop", "length" or "cancelled"
    weights: dict[str, float]  # of the gate, by expert
    left_to_base: float  # the weight that went to no expert


@dataclass(eq=False)
class Question:
    """A prompt, and who wants to know; made by `Answerer.ask` or `Answerer.complete`."""

    prompt: Prompt
    read: str  # by an embedder, where the gate has one
    settings: Settings = Settings()
    expert: str | None = None  # answers alone; None: the gate decides
    base: bool = False  # no expert answers
    whole: bool = False  # blanks around the answer belong to it
    on_text: Callable[[str], Any] = field(default=lambda piece: None)  # called as the text comes
    on_end: Callable[[Answer], Any] = field(default=lambda answer: None)
    cancelled: bool = False  # set by whoever does not want to know any more


@runtime_checkable
class Answers(Protocol):
    """Whoever answers: an `Answerer`, or what stands in for one."""

    experts: Sequence[str]

    def ask(self, example: Example, settings: Settings, **who: Any) -> Question:
        """A question in a template."""

    def complete(self, text: str, settings: Settings, **who: Any) -> Question:
        """A text to go on with."""

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer all questions in one batch."""


class Answerer:
    """A run that answers. Calls from several threads take turns."""

    def __init__(self, model: Any, tokenizer: Any, template: Template) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self._config = model.peft_config["default"]
        self.experts: Sequence[str] = self._config.named_experts
        self._embedder = Embedder(self._config.embedder) if self._config.embedder else None
        self._stops = template.stops(model)
        self._turn = threading.Lock()

    @classmethod
    def open(cls, path: Path) -> Answerer:
        """The answerer of a run folder.

        Raises:
            ValueError: the run has no experts, or is told which of them to use.
        """
        model, tokenizer, run = load_run(path)
        method = run.config["arguments"].get("method")
        if method in TOLD or not isinstance(model.base_model, MoPsModel):
            why = "is told which expert to use" if method in TOLD else "has no experts"
            raise ValueError(f"{path} was trained with method {method!r}, which {why}: give a run of --method mops")
        return cls(model, tokenizer, Template.of(template_of(run), tokenizer))

    def ask(self, example: Example, settings: Settings, **who: Any) -> Question:
        """A question in the run's template, with the turns before it.

        Raises:
            ValueError: it does not fit into the model's positions, or there is no such expert.
        """
        (prompt,) = self.template.prompts([example.turns()])
        return self._question(prompt, example.instruction, settings, who)

    def complete(self, text: str, settings: Settings, **who: Any) -> Question:
        """A text to go on with as it stands.

        Raises:
            ValueError: as `ask`, or the text is empty.
        """
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        if ids and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()  # some tokenizers end every text with it
        if not text or not ids:
            raise ValueError("the prompt is empty: give a text to go on with")
        return self._question(Prompt(ids, [1] * len(ids), 0), text, settings, {"whole": True, **who})

    def _question(self, prompt: Prompt, read: str, settings: Settings, who: dict[str, Any]) -> Question:
        left = room(self.model, len(prompt.input_ids))
        if left < 1:
            raise ValueError(f"the prompt takes {len(prompt.input_ids)} tokens, and of the model's "
                             f"{room(self.model, 0)} positions none is left to answer: shorten it")  # fmt: skip
        if (expert := who.get("expert")) is not None and expert not in self.experts:
            raise ValueError(f"{expert!r} is no expert of this run: choose one of {', '.join(self.experts)}")
        return Question(prompt, read, settings, **who)

    @torch.no_grad()
    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer all questions in one batch, each as if it were alone."""
        if not questions:
            return []
        with self._turn:
            spoken = [Spoken(question, self) for question in questions]
            longest = max(each.limit for each in spoken)
            watch = Watch(self, spoken)
            self.model.generate(
                **self._batch(questions), max_new_tokens=longest, do_sample=False, logits_processor=[Drawn(questions)],
                stopping_criteria=[watch], eos_token_id=self._stops or None, pad_token_id=self._pad,
            )  # fmt: skip
            return [each.end(each.ended or "length") for each in spoken]

    @property
    def _pad(self) -> int:
        found = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if found is None else found)

    def _batch(self, questions: Sequence[Question]) -> dict[str, Any]:
        """Prompts padded on the left, and what the gate is told of them."""
        ids = [question.prompt.input_ids for question in questions]
        masks = [question.prompt.gate_mask for question in questions]
        batch: dict[str, Any] = {
            "input_ids": padded(ids, self._pad, "left"),
            "attention_mask": padded([[1] * len(row) for row in ids], 0, "left"),
        }
        if all(mask is not None for mask in masks):
            batch["gate_mask"] = padded([mask or [] for mask in masks], 0, "left")
        if self._embedder is not None:
            batch["gate_embedding"] = torch.tensor(self._embedder([question.read for question in questions]))
        if any(question.expert is not None for question in questions):
            batch["gate_weights"] = torch.tensor([self._pinned(question.expert) for question in questions])
        batch = {name: value.to(self.model.device) for name, value in batch.items()}
        if any(question.base for question in questions):
            batch["adapter_names"] = [BASE if question.base else "default" for question in questions]
        return batch

    def _pinned(self, expert: str | None) -> list[float]:
        """All weight on one expert; NaN: the gate decides."""
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


class Spoken:
    """One answer as it comes: what is certain of its text is handed on."""

    def __init__(self, question: Question, answerer: Answerer) -> None:
        self.question, self.tokenizer = question, answerer.tokenizer
        self.limit = min(question.settings.max_new_tokens, room(answerer.model, len(question.prompt.input_ids)))
        self.ends = set(answerer._stops)
        self.ids: list[int] = []
        self.handed = ""
        self.ended: str | None = None
        self.by: tuple[dict[str, float], float] = ({}, 1.0)
        self._answer: Answer | None = None

    def add(self, token: int) -> None:
        """Take one more token; hand on what it makes certain."""
        self.ids.append(token)
        if self.question.cancelled:
            self.end("cancelled")
        elif token in self.ends or self._stopped() is not None:
            self.end("stop")
        elif len(self.ids) >= self.limit:
            self.end("length")
        else:
            self._hand(self._certain())

    def end(self, how: str) -> Answer:
        """Hand on the rest, once."""
        if self._answer is None:
            self.ended, at, text = how, self._stopped(), self._text()
            text = text[:at]
            text = text if self.question.whole else text.rstrip()
            self._hand(text)
            weights, left = ({}, 1.0) if self.question.base else self.by
            self._answer = Answer(text, len(self.ids), how, weights, left)
            self.question.on_end(self._answer)
        return self._answer

    def _text(self) -> str:
        found = str(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        return found if self.question.whole else found.lstrip()

    def _stopped(self) -> int | None:
        """Where the first of the texts begins that end the answer."""
        text = self._text() if self.question.settings.stop else ""
        found = [at for stop in self.question.settings.stop if (at := text.find(stop)) >= 0]
        return min(found, default=None)

    def _certain(self) -> str:
        """Without half a character, blanks that may turn out to be the last ones, and the start of a stop."""
        text = self._text().rstrip(HALF)
        text = text if self.question.whole else text.rstrip()
        starts = [len(text) - size for stop in self.question.settings.stop for size in range(1, len(stop))
                  if text.endswith(stop[:size])]  # fmt: skip
        return text[: min(starts, default=len(text))]

    def _hand(self, text: str) -> None:
        if len(text) > len(self.handed) and text.startswith(self.handed):
            piece, self.handed = text[len(self.handed) :], text
            self.question.on_text(piece)


class Watch(StoppingCriteria):
    """Told of each token of a batch; says which rows are at their end."""

    def __init__(self, answerer: Answerer, spoken: Sequence[Spoken]) -> None:
        self.answerer, self.spoken, self.begun = answerer, spoken, False

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """True for rows that have ended."""
        if not self.begun:
            self.begun = True
            for each, by in zip(self.spoken, self.answerer.weights(len(self.spoken)), strict=True):
                each.by = by
        for each, token in zip(self.spoken, input_ids[:, -1].tolist(), strict=True):
            if each.ended is None:
                each.add(token)
        return torch.tensor([each.ended is not None for each in self.spoken], device=input_ids.device)


class Drawn(LogitsProcessor):
    """Draws the tokens of rows with a temperature, each from its own seed, whoever else is in the batch."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self.settings = [question.settings for question in questions]
        self.sources = [torch.Generator().manual_seed(each.seed) for each in self.settings]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores that leave such a row no choice."""
        drawn = [row for row, each in enumerate(self.settings) if each.temperature > 0]
        if not drawn:
            return scores
        scores = scores.clone()
        for row in drawn:
            token = self._draw(scores[row].cpu().double(), self.settings[row], self.sources[row])
            scores[row] = -torch.inf
            scores[row, token] = 0.0
        return scores

    def _draw(self, scores: Tensor, settings: Settings, source: torch.Generator) -> int:
        chances, order = ((scores - scores.max()) / settings.temperature).softmax(-1).sort(descending=True)
        chances = chances.masked_fill(chances.cumsum(-1) - chances >= settings.top_p, 0.0)
        return int(order[torch.multinomial(chances, 1, generator=source)])
