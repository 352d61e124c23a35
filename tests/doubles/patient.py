"""Stands in for a model whose answers a test can hold back."""

from __future__ import annotations

import time
from collections.abc import Sequence

from smartmops.serving.answering import Answer, Question
from smartmops.tokens.parts import Prompt


class Patient:
    """Answers in the place of a model: says one word, then waits until it is let go or nobody wants to know."""

    experts = ("apple", "banana")

    def __init__(self) -> None:
        self.batches: list[list[Question]] = []
        self.let_go = False

    def ask(self, *_: object, **who: object) -> Question:
        return Question(Prompt([1, 2, 3], None, 0), "", **who)  # type: ignore[arg-type]

    complete = ask

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        self.batches.append(list(questions))
        for question in questions:
            question.on_text("one")
        while not self.let_go and not all(question.cancelled for question in questions):
            time.sleep(0.005)
        found = [Answer("one", 1, "cancelled" if each.cancelled else "stop", {}, 1.0) for each in questions]
        for question, answer in zip(questions, found, strict=True):
            question.on_end(answer)
        return found
