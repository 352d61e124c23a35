"""Stands in for a model whose answers a test can hold back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar

from smartmops.serving.answering import Answer, Question
from smartmops.tokens.parts import Prompt


class Patient:
    """Answers in the place of a model: says one word, then waits until it is let go or nobody wants to know."""

    experts = ("apple", "banana")
    tasks: ClassVar[dict[str, dict[str, float]]] = {}

    def __init__(self) -> None:
        self.batches: list[list[Question]] = []
        self.let_go = False

    def ask(self, *_: object, **who: object) -> Question:
        return Question(Prompt([1, 2, 3], None, 0), "", **who)  # type: ignore[arg-type]

    complete = ask

    open = True

    def slots(self) -> Patient:
        self.spoken: list[Said] = []
        return self

    def join(self, questions: Sequence[Question]) -> list[Said]:
        self.batches.append(list(questions))
        new = [Said(question) for question in questions]
        self.spoken += new
        for question in questions:
            question.on_text("one")
        return new

    def step(self) -> None:
        time.sleep(0.005)
        for each in self.spoken:
            if self.let_go or each.question.cancelled:
                each.end("cancelled" if each.question.cancelled else "stop")
        self.spoken = [each for each in self.spoken if each.ended is None]


class Said:
    """An answer of one word."""

    def __init__(self, question: Question) -> None:
        self.question, self.ids = question, [1]
        self.ended: str | None = None

    def end(self, how: str) -> None:
        self.ended = how
        self.question.on_end(Answer("one", 1, how, {}, 1.0))
