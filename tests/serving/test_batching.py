"""What waits is answered together; there is an end to what may wait, to what fails and to the whole."""

from __future__ import annotations

import threading

import pytest

from patient import Patient
from smartmops.serving.answering import Answer, Answerer, Question
from smartmops.serving.batching import Batcher, Closing, Full
from smartmops.tokens.parts import Prompt
from two_tasks import GREEDY, LONG, SHORT, TALK, mixed


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


def test_a_first_question_waits_a_moment_for_the_same_one_put_otherwise(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher, (first, second, *_) = Batcher(answerer), mixed(answerer)
    waits: list[float] = []

    def meanwhile(over: object, seconds: float) -> None:
        waits.append(seconds)
        batcher.submit([second])
        batcher.close()

    monkeypatch.setattr(batcher._change, "wait_for", meanwhile)
    batcher.submit([first])
    batcher.start().join()
    assert (batcher.counts.batches, batcher.counts.questions, len(waits)) == (1, 2, 1) and waits[0] < 0.1


def test_there_is_room_for_so_many_and_a_cancelled_one_takes_none() -> None:
    batcher = Batcher(Patient(), room=2)
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


def test_one_that_fails_tells_only_itself_and_those_beside_it_are_answered(answerer: Answerer) -> None:
    batcher, found = Batcher(answerer), dict[int, Answer]()
    questions = mixed(answerer)
    questions[1].prompt.input_ids[0] = 10**9  # no token of this model: its pass fails

    def broken(piece: str) -> None:
        raise RuntimeError("whoever listens is broken")

    questions[2].on_text = broken
    for number, each in enumerate(questions):
        each.on_end = lambda answer, number=number: found.setdefault(number, answer)
    batcher.submit(questions)
    batcher.start().close()
    batcher.join()
    alone = [answerer.answer([each])[0].text for each in mixed(answerer, GREEDY)]
    assert [found[number].ended for number in (1, 2)] == ["failed", "failed"] and batcher.counts.failed == 2
    assert [found[number].text for number in (0, 3, 4, 5)] == [alone[number] for number in (0, 3, 4, 5)]


def test_questions_join_while_others_are_answered_and_each_answer_is_the_one_given_alone(answerer: Answerer) -> None:
    slots, found = answerer.slots(), list[Answer]()
    questions = [each for _ in range(2) for each in mixed(answerer, GREEDY)]
    spoken = []
    for start in range(0, len(questions), 3):  # three more after every second token
        spoken += slots.join(questions[start : start + 3])
        slots.step()
        slots.step()
    longest = max(len(slots.spoken), 1)
    while slots.spoken:
        slots.step()
    found = [each.end("length") for each in spoken]
    alone = [answerer.answer([each])[0] for each in mixed(answerer, GREEDY)] * 2
    assert longest > 6, "they were under way together"
    assert [(each.text, each.tokens, each.ended) for each in found] == [
        (each.text, each.tokens, each.ended) for each in alone
    ]
    assert [each.weights for each in found] == [pytest.approx(each.weights, abs=2e-4) for each in alone]


def test_questions_to_the_base_alone_join_each_other_and_others_join_them(answerer: Answerer) -> None:
    def asked() -> list[Question]:
        texts = (SHORT, LONG, TALK)
        return [answerer.ask(text, GREEDY, base=True) for text in texts] + [answerer.ask(LONG, GREEDY)]

    alone, slots, spoken = [answerer.answer([each])[0].text for each in asked()], answerer.slots(), []
    for each in asked():
        spoken += slots.join([each])
        slots.step()
    while slots.spoken:
        slots.step()
    assert [each.end("length").text for each in spoken] == alone


def test_a_free_place_is_taken_before_the_others_have_ended(patient: Patient) -> None:
    batcher, first, told = Batcher(patient, size=2).start(), question(), threading.Event()
    batcher.submit([first, question(), question(on_text=lambda piece: told.set())])
    first.cancelled = True
    assert told.wait(600), "the third is answered although the second goes on"
    patient.let_go = True
    batcher.close()
    batcher.join()
    assert batcher.counts.questions in (2, 3) and batcher.counts.failed == 0


def test_what_waits_is_answered_after_the_end_unless_it_is_given_up() -> None:
    for given_up, ended in ((False, "stop"), (True, "cancelled")):
        patient = Patient()
        patient.let_go = True
        batcher, found = Batcher(patient), list[str]()
        batcher.submit([question(on_end=lambda answer, found=found: found.append(answer.ended))])
        batcher.close()
        if given_up:
            batcher.cancel()
        batcher.start().join()
        assert found == [ended]
