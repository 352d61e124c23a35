"""What is asked of a model beside its perplexity: answers, gradients of its tasks, and prompts that teach nothing.

Knows a task and a model, bare or adapted. Trains nothing, writes nothing.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from smartmops.evaluation import interference
from smartmops.evaluation.answers import BATCH, marked, questions
from smartmops.evaluation.perplexity import answer, in_order
from smartmops.flow.compare import shots_of
from smartmops.reading.task import Task
from smartmops.rows.example import Example
from smartmops.tokens.batches import Encoded, encode_all
from smartmops.tokens.template import user_text

NEW, SHOTS, GRADIENTS = 48, 4, 8  # tokens of an answer, solved examples before one, examples a task for gradients
SYSTEM = {
    "dolly": "You are a helpful assistant. Answer in plain prose, briefly and to the point, and from the text that is given "
             "where there is one.",
    "others": "Follow the instruction exactly. Reply with the answer alone, in the form that the instruction asks for, "
              "without an explanation or an introduction.",
}  # fmt: skip


def with_shots(task: Task, examples: Sequence[Example]) -> list[Encoded]:
    """The examples behind `SHOTS` training examples of their task each."""
    return shots_of(replace(task, test_examples=examples), SHOTS, task.base.config.max_position_embeddings)


def with_system(task: Task, examples: Sequence[Example], data: str) -> list[Encoded]:
    longest = task.base.config.max_position_embeddings
    return list(encode_all(instructed(examples, data), task.tokenizer, longest, template=task.template).rows)


def instructed(examples: Sequence[Example], data: str) -> list[Example]:
    """The examples behind the system prompt that was written for such data."""
    said = SYSTEM["dolly" if data.startswith("dolly") else "others"]
    return [replace(example, system=said) for example in examples]


def taught(task: Task, examples: Sequence[Example]) -> list[Example]:
    """The examples behind solved ones of their task, as earlier turns."""
    draw, by_task = random.Random(0), defaultdict(list)
    for example in task.train_examples:
        by_task[example.category].append((user_text(example), example.response))
    return [replace(each, history=tuple(draw.sample(by_task[each.category], SHOTS))) for each in examples]


def asked(task: Task, per_task: int) -> list[Example]:
    """The first test examples of each task."""
    chosen = questions(task.base, task.tokenizer, task.test_examples, per_task, NEW, task.template)
    return [task.test_examples[i] for i in chosen]


def answers(task: Task, model: Any, examples: Sequence[Example]) -> dict[str, Any]:
    """Share of exact greedy answers and mean ROUGE-L, overall and of each task."""
    lengths = [len(user_text(each)) for each in examples]
    shortest_first = sorted(range(len(examples)), key=lambda i: lengths[i])
    groups = [shortest_first[start : start + BATCH] for start in range(0, len(examples), BATCH)]

    def given(group: Sequence[int]) -> list[str]:
        return answer(model, task.tokenizer, [examples[i] for i in group], NEW, task.template)

    return marked(in_order(groups, given), examples) | {"count": len(examples)}


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`answers` of disjoint examples as one."""
    count = sum(part["count"] for part in parts)
    return {
        name: {"overall": sum(part[name]["overall"] * part["count"] for part in parts) / count,
               "per_task": dict(sorted(pair for part in parts for pair in part[name]["per_task"].items()))}
        for name in ("exact_match", "rouge_l")
    } | {"count": count}  # fmt: skip


def cosines(task: Task, model: Any, shared: bool) -> dict[str, Any]:
    """How the gradients of the training tasks agree, on the experts' columns and on those that all rows see."""
    parts = {"routed": None} | ({"shared": interference.SHARED} if shared else {})
    return {
        part: interference.agreement(interference.gradients(task, model, GRADIENTS, names))
        for part, names in parts.items()
    }
