"""On a real model, an answer in a batch that others join and leave is the one that is given alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from smartmops.base import load_base
from smartmops.methods.baselines import build
from smartmops.options.method import MethodConfig
from smartmops.rows.example import Example
from smartmops.serving.answering import Answerer, Question, Settings
from smartmops.tokens.template import Template

TEXTS = (
    "Name three rivers.",
    "What is the capital of France, and what is it known for? Answer in one sentence.",
    "Hello!",
)


def questions(answerer: Answerer) -> Sequence[Question]:
    """To the gate, to one expert, to none; of different lengths before and after."""
    return [
        answerer.ask(Example(TEXTS[0], "", ""), Settings(8)),
        answerer.ask(Example(TEXTS[1], "", ""), Settings(6), expert=answerer.experts[1]),
        answerer.ask(Example(TEXTS[2], "", ""), Settings(4), base=True),
        answerer.complete("The river Rhine", Settings(7)),
    ]


@pytest.mark.smollm2
def test_questions_that_join_and_leave_are_answered_as_alone(smollm2: Path) -> None:
    base, tokenizer = load_base(str(smollm2), "float32")
    model = build(base, MethodConfig(experts=2, prompts_per_expert=3, init="random")).eval()
    answerer = Answerer(model, tokenizer, Template.of("auto", tokenizer))
    alone = [answerer.answer([each])[0] for each in questions(answerer)]
    slots, spoken = answerer.slots(), []
    for each in questions(answerer):  # one more after each token
        spoken += slots.join([each])
        slots.step()
    assert len(slots.spoken) > 1, "they were under way together"
    while slots.spoken:
        slots.step()
    found = [each.end("length") for each in spoken]
    assert [(each.text, each.tokens, each.ended) for each in found] == [
        (each.text, each.tokens, each.ended) for each in alone
    ]
    assert len({each.text for each in alone}) == len(alone)
