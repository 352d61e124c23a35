"""What is asked of a model beside its perplexity: answers, gradients of its tasks, and prompts that teach nothing.

Knows a task and a model, bare or adapted. Trains nothing, writes nothing.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

from smartmops.evaluation import interference
from smartmops.evaluation.answers import exact_match, questions, rouge_l
from smartmops.evaluation.perplexity import answer
from smartmops.reading.task import Task
from smartmops.rows.example import Example
from smartmops.tokens.batches import Encoded, encode_all, few_shot

NEW, BATCH, SHOTS, GRADIENTS = 48, 16, 4, 8  # tokens of an answer, answers at once, solved examples, examples a task
SYSTEM = {
    "dolly": "You are a helpful assistant. Answer in plain prose, briefly and to the point, and from the text that is given "
             "where there is one.",
    "others": "Follow the instruction exactly. Reply with the answer alone, in the form that the instruction asks for, "
              "without an explanation or an introduction.",
}  # fmt: skip


def solved(task: Task) -> Callable[[Example], list[Example]]:
    """Of an example, `SHOTS` training examples of its task."""
    draw, by_task = random.Random(0), defaultdict(list)
    for example in task.train_examples:
        by_task[example.category].append(example)
    return lambda example: draw.sample(by_task[example.category], SHOTS)


def with_shots(task: Task, examples: Sequence[Example]) -> list[Encoded]:
    shots, longest = solved(task), task.base.config.max_position_embeddings
    return [few_shot(each, shots(each), task.tokenizer, longest, task.template) for each in examples]


def with_system(task: Task, examples: Sequence[Example], data: str) -> list[Encoded]:
    longest = task.base.config.max_position_embeddings
    return list(encode_all(instructed(examples, data), task.tokenizer, longest, template=task.template).rows)


def instructed(examples: Sequence[Example], data: str) -> list[Example]:
    """The examples behind the system prompt that was written for such data."""
    said = SYSTEM["dolly" if data.startswith("dolly") else "others"]
    return [replace(example, system=said) for example in examples]


def taught(task: Task, examples: Sequence[Example]) -> list[Example]:
    """The examples behind solved ones, as earlier turns."""
    shots = solved(task)

    def turn(shot: Example) -> tuple[str, str]:
        return "\n\n".join(filter(None, (shot.instruction, shot.context))), shot.response

    return [replace(each, history=tuple(turn(shot) for shot in shots(each))) for each in examples]


def asked(task: Task, per_task: int) -> list[Example]:
    """The first test examples of each task."""
    chosen = questions(task.base, task.tokenizer, task.test_examples, per_task, NEW, task.template)
    return [task.test_examples[i] for i in chosen]


def answers(task: Task, model: Any, examples: Sequence[Example]) -> dict[str, Any]:
    """Share of exact greedy answers and mean ROUGE-L, overall and of each task."""
    ordered = sorted(examples, key=lambda each: len(each.instruction) + len(each.context))
    given = [text for start in range(0, len(ordered), BATCH)
             for text in answer(model, task.tokenizer, ordered[start : start + BATCH], NEW, task.template)]  # fmt: skip
    marks: dict[str, dict[str, list[float]]] = {"exact_match": defaultdict(list), "rouge_l": defaultdict(list)}
    for text, example in zip(given, ordered, strict=True):
        marks["exact_match"][example.category].append(float(exact_match(text, example.response)))
        marks["rouge_l"][example.category].append(rouge_l(text, example.response))
    return {
        name: {"overall": mean(value for own in by_task.values() for value in own),
               "per_task": {of: mean(own) for of, own in sorted(by_task.items())}}
        for name, by_task in marks.items()
    } | {"count": len(ordered)}  # fmt: skip


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
