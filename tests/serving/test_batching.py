"""What waits is answered together; there is an end to what may wait, to what fails and to the whole."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from questions import GREEDY, mixed
from smartmops.serving.answering import Answer, Answerer, Question
from smartmops.serving.batching import Batcher, Closing, Full
from smartmops.tokens.parts import Prompt


def question(**how: object) -> Question:
    return Question(Prompt([1], None, 0), "", **how)  # type: ignore[arg-type]


def test_questions_of_all_tasks_that_wait_are_answered_in_one_batch_as_alone(answerer: Answerer) -> None:
    batcher, found = Batcher(answerer), dict[int, Answer]()
    questions = mixed(answerer)
    for number, each in enumerate(questions):
        each.on_end = lambda answer, number=number: found.setdefault(number, answer)
        batcher.submit([each])
    batcher.start().close()
    batcher.join()
    assert (batcher.counts.batches, batcher.counts.questions) == (1, len(questions))
    alone = [answerer.answer([each])[0].text for each in mixed(answerer, GREEDY)]
    assert [found[number].text for number in range(len(questions))] == alone


def test_there_is_room_for_so_many_and_a_cancelled_one_takes_none() -> None:
    batcher = Batcher(Half(), room=2)
    first = question()
    batcher.submit([first])
    with pytest.raises(Full):
        batcher.submit([question(), question()])
    batcher.submit([question()])
    first.cancelled = True
    batcher.submit([question()])
    batcher.close()
    with pytest.raises(Closing):
        batcher.submit([question()])


class Half:
    """Fails on what it is told to."""

    experts = ()

    def ask(self, *_: object, **who: object) -> Question:
        return question(**who)

    complete = ask

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        if any(each.read == "bad" for each in questions):
            raise RuntimeError("no")
        found = [Answer("", 1, "stop", {}, 1.0) for _ in questions]
        for each, answer in zip(questions, found, strict=True):
            each.on_end(answer)
        return found


def test_a_batch_that_fails_is_told_and_the_next_one_is_answered() -> None:
    batcher, ended, told = Batcher(Half(), size=1).start(), list[str](), threading.Event()
    bad = question(on_end=lambda answer: ended.append(answer.ended))
    bad.read = "bad"
    batcher.submit([bad, question(on_end=lambda answer: (ended.append(answer.ended), told.set()))])
    assert told.wait(60)
    batcher.close()
    batcher.join()
    assert ended == ["failed", "stop"] and batcher.counts.failed == 1


def test_what_waits_is_answered_after_the_end_unless_it_is_given_up() -> None:
    for given_up, ended in ((False, "stop"), (True, "cancelled")):
        batcher, found = Batcher(Half()), list[str]()
        batcher.submit([question(on_end=lambda answer, found=found: found.append(answer.ended))])
        batcher.close()
        if given_up:
            batcher.cancel()
        batcher.start().join()
        assert found == [ended]
