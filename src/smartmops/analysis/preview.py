"""What `train` would read of DATA: counts, lengths, what is cut, what stands twice, and how examples are rendered.

Knows examples and, where a model is named, its tokenizer and the shape in its config. Loads no weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from transformers import AutoTokenizer

from smartmops.attention.packed import IGNORED
from smartmops.base.names import local, readable
from smartmops.checks.errors import DataError
from smartmops.data.several import as_typed
from smartmops.data.tasks import splits
from smartmops.options.finished.reading import DataConfig
from smartmops.reading.early import shape_of
from smartmops.reading.held_out import hold_out
from smartmops.rows.example import Example
from smartmops.tokens.batches import Encoded, Encoding, NoneFits, Truncation, encode_all
from smartmops.tokens.controls import controls_said
from smartmops.tokens.template import Template, check_template
from smartmops.tokens.unfit import Limit, Lost

Parts = Mapping[str, Sequence[Example]]
SHOWN = 3  # texts that stand twice, which are shown


def preview(config: DataConfig) -> dict[str, Any]:
    """Counts of each part and task, repeated texts and, with `config.model`, tokens and rendered examples.

    Returns:
        `examples` {part: count}, `tasks` {task: {part: count}}, `sources` (how many there are), `repeated` (see
        `repeated`); with a model also `max_length` in tokens, `tokens` {task: numbers of tokens and of examples that
        are cut or dropped}, `lost` (a sentence for each task of a part, and each source, that is dropped entirely),
        `controls` (a sentence for each part whose texts spell control tokens) and `rendered`, a list of {task, prompt,
        answer}, whose answer is what is trained on.

    Raises:
        DataError: the data cannot be read or rendered; the message names file, lines and way out.
        BaseModelNotFound: there is no such data or model.
    """
    check_template(config.template)
    train, test = splits(config.data, config.limit, config.test_share, config.data_seed, columns=config.columns)
    train, held = hold_out(train, config, config.data_seed)
    parts: Parts = {"train": train, "validation": held, "test": test}
    every = [example for part in parts.values() for example in part]
    names = sorted({example.category for example in every})
    counts = {name: Counter(example.category for example in part) for name, part in parts.items()}
    found: dict[str, Any] = {
        "examples": {name: len(part) for name, part in parts.items()},
        "tasks": {task: {name: own[task] for name, own in counts.items()} for task in names},
        "sources": len({example.source for example in every} - {""}),
        "repeated": repeated(parts),
    }  # fmt: skip
    return found if config.model is None else found | tokens(config, parts)


def repeated(parts: Parts) -> dict[str, Any]:
    """Questions that stand more than once, compared without regard to case and white space.

    Returns:
        `train`: training examples whose question and answer another one has already; `answers`: training examples whose
        question another one has with another answer; `test` and `validation`: examples whose question is trained on;
        `shown`: some of those, as {part, task, text}.
    """
    questions: dict[str, Counter[str]] = {}
    for example in parts["train"]:
        questions.setdefault(_plain(_question(example)), Counter())[_plain(example.response)] += 1
    found: dict[str, Any] = {
        "train": sum(count - 1 for answers in questions.values() for count in answers.values()),
        "answers": sum(answers.total() for answers in questions.values() if len(answers) > 1),
        "validation": 0, "test": 0, "shown": [],
    }  # fmt: skip
    for name in ("validation", "test"):
        for example in parts[name]:
            if _plain(_question(example)) in questions:
                found[name] += 1
                found["shown"] += [{"part": name, "task": example.category, "text": example.instruction}]
    found["shown"] = found["shown"][:SHOWN]
    return found


def _question(example: Example) -> str:
    turns = [text for turn in example.history for text in turn]
    return "\n".join([example.system, *turns, example.instruction, example.context])


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def tokens(config: DataConfig, parts: Parts) -> dict[str, Any]:
    """What the model's tokenizer makes of the examples, as `preview` returns it."""
    assert config.model is not None
    folder = local(config.model)
    with readable(config.model):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    limit = Limit(config.max_length, shape_of(Path(folder)).get("max_position_embeddings"))
    template = Template.of(config.template, tokenizer)
    rows, encodings = list[Encoded](), dict[str, Encoding]()
    for name, part in parts.items():
        encodings[name] = _encoded(f"{as_typed(config.data)}, {name}", part, tokenizer, limit, template)
        rows += encodings[name].rows
    lost = Lost.of(limit, {name: (parts[name], own.kept, own.too_long) for name, own in encodings.items()})
    dropped = Counter(each.task for each in lost.examples)
    by_task: dict[str, list[Encoded]] = {task: [] for task in sorted({row.category for row in rows} | set(dropped))}
    for row in rows:
        by_task[row.category].append(row)
    return {
        "max_length": limit.tokens,
        "tokens": {task: _numbers(own, dropped[task]) for task, own in by_task.items()},
        "lost": list(lost.said(as_typed(config.data))),
        "controls": [said for name, part in parts.items() for said in controls_said(name, part, tokenizer)],
        "rendered": _rendered(rows, tokenizer, config.shown),
    }


def _encoded(name: str, part: Sequence[Example], tokenizer: Any, limit: Limit, template: Template) -> Encoding:
    if not part:
        return Encoding([], Truncation(), [])
    try:
        return encode_all(part, tokenizer, limit.tokens, template=template)
    except NoneFits as error:
        raise DataError(f"{name}: {limit.none_fits(error.lengths, len(part))}") from error


def _numbers(rows: Sequence[Encoded], dropped: int) -> dict[str, int | float]:
    """Of one task: tokens of whole rows and of answers, and how many examples were shortened or left out."""
    whole = [len(row.input_ids) for row in rows]
    answers = [len(row.labels) - row.labels.count(IGNORED) for row in rows]
    return {
        "median": median(whole) if rows else 0, "longest": max(whole, default=0),
        "answer_median": median(answers) if rows else 0, "answer_longest": max(answers, default=0),
        "shortened": sum(row.tokens_cut > 0 for row in rows), "dropped": dropped,
    }  # fmt: skip


def _rendered(rows: Sequence[Encoded], tokenizer: Any, count: int) -> list[dict[str, str]]:
    """The first example of each task, as many as `count`, and then the second ones."""
    seen: Counter[str] = Counter()
    order = []
    for number, row in enumerate(rows):
        order.append((seen[row.category], number))
        seen[row.category] += 1
    chosen = [rows[number] for _, number in sorted(order)[:count]]
    found = []
    for row in chosen:
        start = next(i for i, label in enumerate(row.labels) if label != IGNORED)
        prompt, answer = (tokenizer.decode(ids) for ids in (row.input_ids[:start], row.input_ids[start:]))
        found.append({"task": row.category, "prompt": prompt, "answer": answer})
    return found
