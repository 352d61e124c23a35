"""One expert, trained by itself: on examples, or on what the base says under a system prompt.

Where the gate gives it all weight, nobody sees the other experts; so it is trained as the only one, and they are not
even there. Knows a model whose adapter it may replace for a while; writes no files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from smartmops.checks.errors import DataError
from smartmops.evaluation.measure import measured
from smartmops.evaluation.perplexity import answer
from smartmops.fitting.kept import Kept
from smartmops.fitting.loop import fit
from smartmops.fitting.validation import spacing
from smartmops.options.finished.surgery import Trial
from smartmops.options.method import MethodConfig
from smartmops.options.training import Schedule
from smartmops.preparing import gating
from smartmops.preparing.initial import initialise
from smartmops.progress.bars import track
from smartmops.reading.task import Task
from smartmops.rows.example import Example
from smartmops.tokens.batches import Encoded, pack

from .adapter.parts import COLUMNS, Parts, alone, moved, put, taken
from .subject import Subject

Columns = dict[str, Tensor]
FRAME = 32  # tokens that a template may put around a system prompt
AT_ONCE = 16  # questions that the base answers in one batch
WARMUP = 0.06  # share of the steps
CLIP = 2.0  # gradients are cut to so many times their median norm of late


def started(subject: Subject, rows: Sequence[Encoded], task: Task, scale: float, seed: int) -> Columns:
    """Keys and values of an expert that starts from text of its task, in units of the run's adapter."""
    parts = subject.parts
    count = parts.config.prompts_per_expert
    empty = {name: torch.zeros_like(parts.tensors[name][:count]) for name in COLUMNS}
    put(subject.model, alone(parts, empty, scale))
    initialise(subject.model, rows, task.collator, [0] * len(rows), seed)
    made = taken(subject.model)
    put(subject.model, parts)
    return moved(made.tensors, made, parts)


def trained(subject: Subject, task: Task, columns: Columns, scale: float, trial: Trial) -> tuple[Columns, float]:
    """An expert after training on a task's examples; also its perplexity on the part held out of them.

    The best state on that part is kept; without one, the last, and its perplexity is infinite.
    """
    model = subject.model
    put(model, alone(subject.parts, columns, scale), COLUMNS)
    method = MethodConfig(method="prompt-tuning", experts=1, relative_lr=trial.relative_lr)
    schedule = Schedule(steps=trial.steps, batch_size=trial.batch_size, seed=trial.seed, save_every=10**9)
    schedule = replace(schedule, eval_every=spacing(schedule, len(task.validation), 1))
    look = (lambda: measured(task, model, task.validation)) if task.validation else None
    before = model.config.use_cache
    with TemporaryDirectory() as folder:
        kept = fit(model, method, schedule, *task.feed(model), Path(folder), look=look)
    model.config.use_cache = before
    found = taken(model).tensors
    put(model, subject.parts)
    return {name: found[name] for name in COLUMNS}, kept.perplexity


@dataclass
class Lesson:
    """Questions with the base's answers under a system prompt, and the same without it."""

    told: Sequence[Encoded]  # with the prompt
    plain: Sequence[Encoded]  # without, in the same order
    examples: Sequence[Example]  # without
    saved: float  # tokens of a request that the prompt takes, in the mean


@dataclass(frozen=True)
class Agreement:
    """How near an answerer is to the base under the prompt, on answers of the latter."""

    greedy: float  # share of tokens whose most likely next token is the same
    nats: float  # Kullback-Leibler divergence of the next token's distribution, in the mean

    def __str__(self) -> str:
        return f"{self.greedy:.1%} of greedy tokens, {self.nats:.3f} nats"


def lesson(subject: Subject, prompt: str, questions: Sequence[Example], tokens: int) -> Lesson:
    """Let the base answer the questions under the prompt.

    Raises:
        ValueError: none of them can be put both ways.
    """
    with subject.model.disable_adapter():
        replies = _replies(subject, [_under(prompt, each) for each in questions], tokens)
    plain = [replace(each, response=reply) for each, reply in zip(questions, replies, strict=True) if reply]
    told = [_under(prompt, each) for each in plain]
    if not plain:
        raise DataError(f"the base answers none of {len(questions)} questions under the prompt: give others by "
                         "--inputs")  # fmt: skip
    config = subject.config("", validation_share=0.0)
    longer = replace(config, max_length=config.max_length + len(subject.tokenizer(prompt)["input_ids"]) + FRAME)
    pairs = _paired(*(Task.of(subject.model, subject.tokenizer, part, [], how)
                      for part, how in ((told, longer), (plain, config))))  # fmt: skip
    if not pairs:
        raise DataError(f"none of {len(plain)} questions fits with the prompt into {config.max_length} tokens: give a "
                         "shorter prompt, or shorter questions by --inputs")  # fmt: skip
    saved = sum(len(one.input_ids) - len(other.input_ids) for one, other, _ in pairs) / len(pairs)
    return Lesson([one for one, _, _ in pairs], [other for _, other, _ in pairs], [each for _, _, each in pairs], saved)


def _under(prompt: str, example: Example) -> Example:
    return replace(example, system=f"{prompt}\n\n{example.system}" if example.system else prompt)


def _replies(subject: Subject, examples: Sequence[Example], tokens: int) -> list[str]:
    template = subject.template
    found: list[str] = []
    for start in track(range(0, len(examples), AT_ONCE), "the base answers under the prompt"):
        found += answer(subject.model, subject.tokenizer, examples[start : start + AT_ONCE], tokens, template)
    return found


def _paired(told: Task, plain: Task) -> list[tuple[Encoded, Encoded, Example]]:
    """Rows of the same question with and without the prompt, both whole, with the same answer's tokens."""
    first = {replace(e, system=""): row for e, row in zip(told.train_examples, told.train, strict=True)}
    pairs = []
    for example, row in zip(plain.train_examples, plain.train, strict=True):
        with_prompt = first.get(replace(example, system=""))
        if with_prompt is None or with_prompt.tokens_cut or row.tokens_cut:
            continue
        if _learnt(with_prompt) == _learnt(row):
            pairs.append((with_prompt, row, example))
    return pairs


def _learnt(row: Encoded) -> list[int]:
    return [label for label in row.labels if label >= 0]


@torch.no_grad()
def teacher(subject: Subject, rows: Sequence[Encoded]) -> list[Float[Tensor, "tokens hidden"]]:
    """What the base predicts each answer's tokens from: its normed last hidden states, row by row."""
    tuner, found = subject.model.base_model, []
    with subject.model.disable_adapter():
        for row in track(rows, "the base reads its answers"):
            batch = {name: value.to(subject.model.device) for name, value in pack([row]).items()}
            found.append(tuner.predicting(batch)[0].cpu())
    return found


def distilled(
    subject: Subject, rows: Sequence[Encoded], targets: Sequence[Tensor], columns: Columns, scale: float, trial: Trial
) -> Columns:
    """An expert under which the base, without the prompt, predicts what it predicts with it: by KL on all logits."""
    model = subject.model
    put(model, alone(subject.parts, columns, scale), COLUMNS)
    task = _task_of(subject, rows)
    trainable = [each for each in model.parameters() if each.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=trial.relative_lr, weight_decay=0.0)
    generator, kept = torch.Generator().manual_seed(trial.seed), Kept()
    model.train()
    for step in track(range(trial.steps), "distilling the prompt"):
        chosen = torch.randint(len(rows), (trial.batch_size,), generator=generator).tolist()
        _kl(model, task, chosen, targets).mean().backward()  # type: ignore[no-untyped-call]
        kept.clip(trainable, CLIP)
        optimiser.param_groups[0]["lr"] = trial.relative_lr * _rate(step, trial.steps)
        optimiser.step()
        optimiser.zero_grad()
    found = taken(model).tensors
    put(model, subject.parts)
    return {name: found[name] for name in COLUMNS}


def _rate(step: int, steps: int) -> float:
    """Share of the full rate: up, then down to zero as a cosine."""
    warm = max(1, round(WARMUP * steps))
    return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / max(steps, 1))))


def _task_of(subject: Subject, rows: Sequence[Encoded]) -> Task:
    """Rows with a cache of what the frozen half makes of them."""
    key = ("task of", id(rows))
    if key not in subject.found:
        collator = Task.of(subject.model, subject.tokenizer, [], [], subject.config("", validation_share=0.0))
        subject.found[key] = replace(collator, train=rows)
    found: Task = subject.found[key]
    return found


def _kl(model: Any, task: Task, chosen: Sequence[int], targets: Sequence[Tensor]) -> Float[Tensor, " tokens"]:
    """Divergence of the adapted model from the teacher, of each token of these rows."""
    cache = task.states.of(model, task.train)
    packed = pack([task.train[i] for i in chosen]) if cache is None else cache.batch(chosen)
    mine = model.base_model.logits(model.base_model.predicting({k: v.to(model.device) for k, v in packed.items()})[0])
    with torch.no_grad():
        theirs = model.base_model.logits(torch.cat([targets[i] for i in chosen]).to(model.device))
    return F.kl_div(F.log_softmax(mine.float(), -1), F.log_softmax(theirs.float(), -1), reduction="none",
                    log_target=True).sum(-1)  # fmt: skip


@torch.no_grad()
def agreement(subject: Subject, rows: Sequence[Encoded], targets: Sequence[Tensor], parts: Parts | None) -> Agreement:
    """How near the base without the prompt (None), or under an adapter of one expert, is to the base with it."""
    model = subject.model
    put(model, parts or subject.parts)
    same, nats, count = 0.0, 0.0, 0
    with gating.closed(model) if parts is None else nullcontext():
        for row, target in zip(rows, targets, strict=True):
            batch = {name: value.to(model.device) for name, value in pack([row]).items()}
            mine = model.base_model.logits(model.base_model.predicting(batch)[0]).float()
            theirs = model.base_model.logits(target.to(model.device)).float()
            same += float((mine.argmax(-1) == theirs.argmax(-1)).sum())
            nats += float(F.kl_div(mine.log_softmax(-1), theirs.log_softmax(-1), reduction="sum", log_target=True))
            count += len(target)
    put(model, subject.parts)
    return Agreement(same / count, nats / count)
