"""Questions that wait, whatever their task, are answered in one batch by one thread. Knows questions; knows no HTTP.

Who comes while a batch is answered waits for its end: rows do not join a batch that runs.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from .answering import Answer, Answers, Question

logger = logging.getLogger(__name__)


class Full(Exception):
    """As many questions wait as may wait."""


class Closing(Exception):
    """No more questions are taken."""


@dataclass
class Counts:
    """What was done since the start."""

    batches: int = 0
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
        while batch := self._taken():
            self._now, self.running = batch, len(batch)
            try:
                self._count(batch, self._answerer.answer(batch))
            except Exception:
                logger.exception("a batch of %d failed", len(batch))
                self.counts.failed += len(batch)
                for question in batch:
                    question.on_end(FAILED)
            finally:
                self._now, self.running = [], 0

    def _taken(self) -> list[Question]:
        """The questions that have waited longest; none once all is over."""
        with self._change:
            while True:
                found: list[Question] = []
                while self._waiting and len(found) < self.size:
                    question = self._waiting.popleft()
                    if question.cancelled:
                        self.counts.cancelled += 1
                        question.on_end(GONE)
                    else:
                        found.append(question)
                if found or self._closing:
                    return found
                self._change.wait()

    def _count(self, batch: Sequence[Question], answers: Sequence[Answer]) -> None:
        self.counts.batches += 1
        self.counts.questions += len(batch)
        self.counts.cancelled += sum(answer.ended == "cancelled" for answer in answers)
        self.counts.prompt_tokens += sum(len(question.prompt.input_ids) for question in batch)
        self.counts.tokens += sum(answer.tokens for answer in answers)


GONE = Answer("", 0, "cancelled", {}, 0.0)
FAILED = Answer("", 0, "failed", {}, 0.0)
