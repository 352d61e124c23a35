"""Perplexity over response tokens, and sample answers. Trains nothing, writes nothing."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int

from smartmops.attention.packed import IGNORED
from smartmops.checks.errors import ConfigError, DataError
from smartmops.progress.bars import counted
from smartmops.rows.example import Example
from smartmops.states.activations import ActivationCache
from smartmops.states.answer_states import AnswerStates
from smartmops.tokens.batches import Collator, Encoded, by_budget, pack, prompts
from smartmops.tokens.template import Template
from smartmops.tuner import MoPsModel

T = TypeVar("T")
BUDGET = 2048  # tokens that go through a MoPs model at once in evaluation
PADDED = 4096  # tokens, padding included, that go through any other: logits of a large vocabulary are what fills memory


@dataclass
class Evaluation:
    """Perplexity = exp(sum of nats / number of response tokens, EOS included), overall and per task."""

    overall: float
    per_task: dict[str, float]
    tokens: dict[str, int]  # response tokens of each task

    @classmethod
    def of(cls, nats: Mapping[str, float], tokens: Mapping[str, int]) -> Evaluation:
        """From the sums of each task."""
        return cls(
            math.exp(sum(nats.values()) / sum(tokens.values())),
            {task: math.exp(nats[task] / tokens[task]) for task in sorted(nats)},
            {task: tokens[task] for task in sorted(nats)},
        )

    @classmethod
    def merged(cls, parts: Sequence[Evaluation]) -> Evaluation:
        """One evaluation of several on disjoint examples."""
        nats: dict[str, float] = defaultdict(float)
        tokens: dict[str, int] = defaultdict(int)
        for part in parts:
            for task, count in part.tokens.items():
                nats[task] += math.log(part.per_task[task]) * count
                tokens[task] += count
        return cls.of(nats, tokens)

    def metrics(self) -> dict[str, Any]:
        """As `metrics.json` holds it."""
        return {"perplexity": {"overall": self.overall, "per_task": self.per_task}, "tokens": self.tokens}


def batch_for(model: Any, rows: Sequence[Encoded], collator: Collator) -> dict[str, torch.Tensor]:
    """The rows as one padded batch, where the model is."""
    return {name: value.to(model.device) for name, value in collator(rows).items()}


def padded_batches(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Numbers of rows in batches of at most `most` and of at most `PADDED` tokens, the shortest rows first."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not groups or len(groups[-1]) == most or (len(groups[-1]) + 1) * lengths[i] > PADDED:
            groups.append([])
        groups[-1].append(i)
    return groups


def in_order(groups: Iterable[Sequence[int]], found_of: Callable[[Sequence[int]], Iterable[T]]) -> list[T]:
    """What `found_of` says of the numbers of each group, in the order of the numbers 0, 1, 2, ..."""
    found = {i: each for group in groups for i, each in zip(group, found_of(group), strict=True)}
    return [found[i] for i in range(len(found))]


@torch.no_grad()
def evaluate(
    model: Any,
    rows: Sequence[Encoded],
    collator: Collator,
    batch_size: int = 32,
    progress: bool = False,
    cache: ActivationCache | AnswerStates | None = None,
) -> Evaluation:
    """Evaluate a model (bare or adapted) on encoded examples, in batches of similar length and at most `PADDED` tokens.

    With a `cache` of these very rows, a MoPs model starts from the injection layer.

    Raises:
        DataError: `rows` is empty.
    """
    if not rows:
        raise DataError("0 examples to evaluate: give one at least")
    was_training = model.training
    model.eval()
    nats: dict[str, float] = defaultdict(float)
    tokens: dict[str, int] = defaultdict(int)
    with counted("evaluating", len(rows), progress) as done:
        for task, found in _each(model, rows, collator, batch_size, cache):
            nats[task] += found.sum().item()
            tokens[task] += len(found)
            done(1)
    model.train(was_training)
    return Evaluation.of(nats, tokens)


def _each(
    model: Any,
    rows: Sequence[Encoded],
    collator: Collator,
    batch_size: int,
    cache: ActivationCache | AnswerStates | None,
) -> Iterator[tuple[str, Float[torch.Tensor, " tokens"]]]:
    """Task and response nats of each row; a MoPs model reads rows end to end, any other padded ones."""
    if isinstance(getattr(model, "base_model", None), MoPsModel):
        for group in by_budget([len(row.input_ids) for row in rows], BUDGET):
            given = pack([rows[i] for i in group]) if cache is None else cache.batch(group)
            batch = {name: value.to(model.device) for name, value in given.items()}
            lengths = batch["lengths"].tolist()
            found, labels = model.base_model.nats(batch).split(lengths), torch.split(batch["labels"], lengths)
            for i, each, own in zip(group, found, labels, strict=True):
                yield rows[i].category, each[:-1][own[1:] != IGNORED]
        return
    for group in padded_batches([len(row.input_ids) for row in rows], batch_size):
        chunk = [rows[i] for i in group]
        batch = batch_for(model, chunk, collator)
        logits = model(**batch, use_cache=False).logits[:, -batch["input_ids"].shape[1] :]
        for row, own, labels in zip(chunk, logits, batch["labels"], strict=True):
            yield row.category, _nats(own, labels)


def _nats(
    logits: Float[torch.Tensor, "seq vocabulary"], labels: Int[torch.Tensor, " seq"]
) -> Float[torch.Tensor, " tokens"]:
    """Nats of each response token."""
    at = (labels[1:] != IGNORED).nonzero()[:, 0]
    return F.cross_entropy(logits[at].float(), labels[at + 1], reduction="none")


def room(model: Any, max_new_tokens: int) -> int:
    """Tokens a prompt may have so that the answer still fits the model's positions; 0 or less: none fits."""
    return int(getattr(model.config, "max_position_embeddings", 2**30)) - max_new_tokens


def left_to_answer(model: Any, tokens: int) -> int:
    """Positions that a prompt of so many tokens leaves.

    Raises:
        DataError: none.
    """
    left = room(model, tokens)
    if left < 1:
        raise DataError(f"the prompt takes {tokens} tokens, and of the model's {room(model, 0)} positions none is left "
                        "to answer: shorten it")  # fmt: skip
    return left


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    max_new_tokens: int = 48,
    template: Template | None = None,
    **inputs: Any,
) -> list[str]:
    """Greedy answers to the examples' instructions, as one left-padded batch; each stops at the end of its turn.

    Args:
        model: Bare or adapted.
        tokenizer: Its own.
        examples: With their earlier turns; responses are not looked at.
        max_new_tokens: Of each answer.
        template: Of this tokenizer; None: `auto`.
        inputs: More for `generate`, such as `gate_embedding`.
    """
    was_training, chosen = model.training, template or Template.of("auto", tokenizer)
    model.eval()
    if (left := room(model, max_new_tokens)) < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens}, but this model has {left + max_new_tokens} positions: "
                          "choose fewer")  # fmt: skip
    batch = prompts(examples, tokenizer, left, chosen)
    if not isinstance(getattr(model, "base_model", None), MoPsModel):
        batch.pop("gate_mask", None)
    batch = {name: value.to(model.device) for name, value in batch.items()}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    out = model.generate(**batch, **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad,
                         eos_token_id=chosen.stops(model))  # fmt: skip
    model.train(was_training)
    return [
        text.strip() for text in tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    ]


def firsts(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    per_task: int,
    max_new_tokens: int = 48,
    template: Template | None = None,
) -> list[int]:
    """Numbers of the first examples of each task, tasks in order, whose instructions leave room for an answer."""
    taken: dict[str, list[int]] = defaultdict(list)
    fits, chosen = room(model, max_new_tokens), template or Template.of("auto", tokenizer)
    for i, example in enumerate(examples):
        if len(taken[example.category]) >= per_task:
            continue
        if chosen.count(replace(example, context="").turns()) < fits:
            taken[example.category].append(i)
    return [i for task in sorted(taken) for i in taken[task]]


def samples(
    model: Any, tokenizer: Any, examples: Sequence[Example], per_task: int = 2, template: Template | None = None
) -> list[dict[str, str]]:
    """The frozen model's and the adapted model's answers to the first examples of each task, side by side."""
    chosen = [examples[i] for i in firsts(model, tokenizer, examples, per_task, template=template)]
    with model.disable_adapter():
        frozen = answer(model, tokenizer, chosen, template=template)
    adapted = answer(model, tokenizer, chosen, template=template)
    return [
        {"category": e.category, "instruction": e.instruction, "context": e.context, "reference": e.response,
         "frozen": before, "adapted": after}
        for e, before, after in zip(chosen, frozen, adapted, strict=True)
    ]  # fmt: skip
