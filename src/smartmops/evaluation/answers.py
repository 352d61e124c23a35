"""Greedy answers held against references: ROUGE-L and exact match, of the adapted model and of the frozen one.

Knows text and a model that generates. Trains nothing, writes nothing.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

import torch

from smartmops.checks.errors import ConfigError, DataError
from smartmops.progress.bars import track
from smartmops.rows.example import Example
from smartmops.tokens.batches import Encoded, prompts
from smartmops.tokens.template import Template
from smartmops.tuner import MoPsModel

from .perplexity import answer, firsts, in_order, room

BATCH = 16  # answers that are generated at once
PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answer: str, reference: str) -> bool:
    """Whether both are the same once lowered, without ASCII punctuation, and with runs of white space as one blank.

    As `normalize_answer` of Super-NaturalInstructions' evaluation (Wang et al. 2022) does it.
    """
    one, two = (" ".join(text.lower().translate(PUNCTUATION).split()) for text in (answer, reference))
    return one == two


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L (Lin 2004), 0 to 1: F1 of the longest common subsequence of words, 2 * lcs / (words of both).

    As Super-NaturalInstructions evaluates (Wang et al. 2022, with the package rouge_score): text is lowered and split
    at everything but a to z and 0 to 9; 0 where either has no such word. It differs in two ways. Words are not stemmed
    (there, Porter's stemmer makes "walked" and "walks" one word), so scores here are the same or lower. And there is
    one reference for each answer, since our readers keep the first; there, the best of several counts.
    """
    one, two = _words(answer), _words(reference)
    return 2 * _common(one, two) / (len(one) + len(two)) if one and two else 0.0


def _words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def _common(one: Sequence[str], two: Sequence[str]) -> int:
    """Length of the longest common subsequence; a row of the table of prefixes at a time."""
    above = [0] * (len(two) + 1)
    for word in one:
        row = [0]
        for i, other in enumerate(two):
            row.append(above[i] + 1 if word == other else max(above[i + 1], row[i]))
        above = row
    return above[-1]


def questions(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    per_task: int,
    max_new_tokens: int,
    template: Template | None = None,
) -> list[int]:
    """Numbers of the first `per_task` examples of each task that leave room for `max_new_tokens`, tasks in order.

    Raises:
        ConfigError, DataError: one of the numbers is below 1, or no example leaves so much room in the model's
            positions.
    """
    for name, value in (("examples of each task", per_task), ("new tokens", max_new_tokens)):
        if value < 1:
            raise ConfigError(f"{value} {name} to answer: choose 1 or more")
    found = firsts(model, tokenizer, examples, per_task, max_new_tokens, template)
    if not found:
        left = max(0, room(model, max_new_tokens))
        raise DataError(f"none of {len(examples)} instructions fits into the {left} positions that {max_new_tokens} "
                        "new tokens leave of the model's: choose fewer new tokens")  # fmt: skip
    return found


def score(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    rows: Sequence[Encoded],
    max_new_tokens: int,
    template: Template | None = None,
) -> dict[str, Any]:
    """Scores of greedy answers to `examples`, as `metrics.json` holds them: shares from 0 to 1, means over answers.

    An answer ends with the end of its turn or after `max_new_tokens`. `frozen` holds the scores with the adapter
    switched off.

    Args:
        model: A PEFT model of any method.
        tokenizer: The base model's.
        examples: That leave room for an answer, as `questions` chooses them.
        rows: The examples encoded; of these, only a `gate_embedding` is read.
        max_new_tokens: Of each answer.
        template: Of this tokenizer; None: `auto`.
    """
    groups = batches(model, tokenizer, examples, max_new_tokens, template)

    def marks(what: str) -> dict[str, Any]:
        def given(group: Sequence[int]) -> list[str]:
            told = _told(model, [rows[i] for i in group])
            return answer(model, tokenizer, [examples[i] for i in group], max_new_tokens, template, **told)

        return marked(in_order(track(groups, f"{what} answers"), given), examples)

    adapted = marks("adapted")
    with model.disable_adapter():
        frozen = marks("frozen")
    counts = Counter(example.category for example in examples)
    return adapted | {"frozen": frozen, "count": dict(sorted(counts.items())), "max_new_tokens": max_new_tokens}


def batches(
    model: Any, tokenizer: Any, examples: Sequence[Example], max_new_tokens: int, template: Template | None
) -> list[list[int]]:
    """Numbers of the examples in batches that are answered at once, the shortest prompts first."""
    made = prompts(examples, tokenizer, room(model, max_new_tokens), template)
    lengths = made["attention_mask"].sum(-1).tolist()
    # PEFT's prompts at the input know no positions, and left padding would come between them and the text.
    alike = model.active_peft_config.is_prompt_learning
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not groups or len(groups[-1]) == BATCH or (alike and lengths[groups[-1][0]] != lengths[i]):
            groups.append([])
        groups[-1].append(i)
    return groups


def _told(model: Any, rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """What the gate is told instead of reading the instruction, where rows carry it."""
    found = [row.gate_embedding for row in rows if row.gate_embedding is not None]
    return {"gate_embedding": torch.stack(found)} if found and isinstance(model.base_model, MoPsModel) else {}


def marked(given: Sequence[str], examples: Sequence[Example]) -> dict[str, Any]:
    """`exact_match` and `rouge_l` of answers to the examples, each `overall` and `per_task`."""
    return {"exact_match": _shares(exact_match, given, examples), "rouge_l": _shares(rouge_l, given, examples)}


def _shares(
    mark: Callable[[str, str], float], given: Sequence[str], examples: Sequence[Example]
) -> dict[str, Any]:  # fmt: skip
    """Means over all answers and over those of each task."""
    by_task: dict[str, list[float]] = {task: [] for task in sorted({example.category for example in examples})}
    for text, example in zip(given, examples, strict=True):
        by_task[example.category].append(float(mark(text, example.response)))
    return {
        "overall": mean(value for own in by_task.values() for value in own),
        "per_task": {task: mean(own) for task, own in by_task.items()},
    }
