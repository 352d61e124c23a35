"""Questions of any task share one batch, which one thread keeps running. Knows questions; knows no HTTP.

Who comes while others are answered joins them before the next token, as soon as a place is free.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .answering import Answer, Answers, Question

GATHER = 0.004  # seconds that a first question waits for others, so that one put in several ways is read once


class Full(Exception):
    """As many questions wait as may wait."""


class Closing(Exception):
    """No more questions are taken."""


@dataclass
class Counts:
    """What was done since the start."""

    batches: int = 0  # times that questions joined
    steps: int = 0  # passes that made a token of every answer under way
    questions: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    tokens: int = 0


class Batcher:
    """One thread that answers questions, up to `size` at once; `room` more may wait."""

    def __init__(self, answerer: Answers, size: int = 16, room: int = 64) -> None:
        self.size, self.room, self.counts, self.running = size, room, Counts(), 0
        self._answerer = answerer
        self._waiting: deque[Question] = deque()
        self._now: list[Question] = []
        self._under_way: list[Any] = []
        self._change = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)

    def start(self) -> Batcher:
        """Begin to answer."""
        self._thread.start()
        return self

    @property
    def waiting(self) -> int:
        """Questions that no batch has taken yet."""
        return len(self._waiting)

    @property
    def closing(self) -> bool:
        """Whether no more questions are taken."""
        return self._closing

    def submit(self, questions: Sequence[Question]) -> None:
        """Let questions wait, all or none of them.

        Raises:
            Full: there is no room for them.
            Closing: the end has come.
        """
        with self._change:
            if self._closing:
                raise Closing
            if sum(not each.cancelled for each in self._waiting) + len(questions) > self.room:
                raise Full
            self._waiting.extend(questions)
            self._change.notify_all()

    def close(self) -> None:
        """Take no more; those that wait are still answered. May be called by a signal's handler."""
        self._closing = True

    def cancel(self) -> None:
        """Give up all that waits or runs."""
        for question in [*self._now, *self._waiting]:
            question.cancelled = True

    def join(self) -> None:
        """Wait until all is answered; only after `close`."""
        with self._change:
            self._change.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        slots = self._answerer.slots()
        while self._taken(slots) or slots.spoken:
            if slots.spoken:
                slots.step()
                self.counts.steps += 1
            self._count()

    def _taken(self, slots: Any) -> bool:
        """Let those that have waited longest join, as many as there is room for; wait where nothing runs.

        Returns:
            False: all is over.
        """
        with self._change:
            while True:
                if self._waiting and not slots.spoken:
                    self._change.wait_for(lambda: self._closing or len(self._waiting) >= self.size, GATHER)
                new: list[Question] = []
                while self._waiting and slots.open and len(slots.spoken) + len(new) < self.size:
                    question = self._waiting.popleft()
                    if question.cancelled:
                        self.counts.cancelled += 1
                        question.on_end(GONE)
                    else:
                        new.append(question)
                if new or slots.spoken or self._closing:
                    break
                self._change.wait()
            self._now = [*self._now, *new]
            self.running = len(self._now)
        if new:
            self.counts.batches += 1
            self.counts.questions += len(new)
            self.counts.prompt_tokens += sum(len(question.prompt.input_ids) for question in new)
            self._under_way += slots.join(new)
        return bool(new)

    def _count(self) -> None:
        """Take note of answers that have ended."""
        ended = [each for each in self._under_way if each.ended is not None]
        if not ended:
            return
        self._under_way = [each for each in self._under_way if each.ended is None]
        self.counts.cancelled += sum(each.ended == "cancelled" for each in ended)
        self.counts.failed += sum(each.ended == "failed" for each in ended)
        self.counts.tokens += sum(len(each.ids) for each in ended)
        self._now = [each.question for each in self._under_way]
        self.running = len(self._now)


GONE = Answer("", 0, "cancelled", {}, 0.0)
