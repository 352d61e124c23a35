"""The changes that need no new data: list, drop, merge, rename, freeze, calibrate. Prints nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from smartmops.checks.errors import RunError
from smartmops.evaluation.measure import mean_weights
from smartmops.evaluation.perplexity import Evaluation
from smartmops.options.finished.surgery import (
    CalibrateConfig,
    DropConfig,
    FreezeConfig,
    ListConfig,
    MergeConfig,
    RenameConfig,
)
from smartmops.reading.task import Task
from smartmops.tokens.batches import Encoded

from . import grow
from .adapter import claims, parts
from .adapter.parts import COLUMNS, Parts
from .subject import SHARE, Subject, Weights, one_at_a_time, some
from .written import Change, trained_on, write

NEVER = 2.0  # a null threshold that no weight reaches
JOINED = 400  # examples of two merged experts that the one in their place is trained on, at most


def listed(run: Path, config: ListConfig) -> dict[str, Any]:
    """Each expert of a run.

    Returns:
        `experts` {name: `tasks` (whose instructions go to it first), `usage` {task: mean gate weight}, `share` (of all
        instructions), `nearest` {name: cosine}, `cost` (of dropping it, `perplexity` before and after, and the `tasks`
        that change by more than a tenth of a percent), `frozen`, `chosen_by` (gate, rule or name)}, `rows` (how many
        were measured), `part` (of which part of the data), `unread` (why there is neither usage nor cost, or empty).

    Raises:
        FileNotFoundError, ValueError: as `Subject.open`.
    """
    subject = Subject.open(run, config.old, config.columns, config.rows)
    found = {name: _alone(subject.parts, number) for number, name in enumerate(subject.parts.names)}
    if subject.own is None:
        return {"experts": found, "rows": 0, "unread": subject.why}
    rows = subject.held("validation")
    weights = subject.weights(rows, "validation")
    usage = mean_weights(rows, weights.gate)
    first = {task: max(range(len(found)), key=lambda e: each[e]) for task, each in usage.items() if max(each) > 0}
    before = subject.measure(subject.own, rows)
    for number, (name, each) in enumerate(found.items()):
        each["tasks"] = [task for task, expert in first.items() if expert == number]
        each["usage"] = {task: own[number] for task, own in usage.items()}
        each["share"] = weights.mean()[number]
        each["cost"] = _cost(subject, rows, name, before)
    return {"experts": found, "rows": len(rows), "part": subject.part("validation"), "unread": ""}


def _alone(held: Parts, number: int) -> dict[str, Any]:
    """What an expert's own tensors tell."""
    flat = torch.stack([_flat(held, each) for each in range(len(held.names))])
    near = F.cosine_similarity(flat, flat[number][None])
    order = [i for i in near.argsort(descending=True).tolist() if i != number][:2]
    name, rows = held.names[number], held.config.num_rows
    ways = {"gate" if i < rows else _rule(held, i - rows) for i, e in enumerate(held.routes) if e == number}
    return {"nearest": {held.names[i]: float(near[i]) for i in order}, "chosen_by": " and ".join(sorted(ways)),
            "frozen": name in (held.config.frozen_experts or [])}  # fmt: skip


def _rule(held: Parts, claim: int) -> str:
    return "rule" if parts.hold(held)[claim] else "name"


def _flat(held: Parts, expert: int) -> torch.Tensor:
    """The mean column of an expert, keys and values end to end: columns have no order of their own."""
    return torch.cat([value.float().mean(0).flatten() for value in held.columns(expert).values()])


def _cost(subject: Subject, rows: Sequence[Encoded], name: str, before: Evaluation) -> dict[str, Any] | None:
    """Perplexity before and after an expert is dropped; None where it cannot be."""
    try:
        less = parts.without(subject.parts, name)
    except ValueError:
        return None
    return _told(before, subject.measure(subject.known(), rows, less))


def _told(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Both overall, and of the tasks that change by more than a tenth of a percent."""
    pairs = {task: [value, after.per_task[task]] for task, value in before.per_task.items()}
    changed = {task: pair for task, pair in pairs.items() if abs(pair[1] / pair[0] - 1) > 1e-3}
    return {"before": before.overall, "after": after.overall, "tasks": changed}


def both(
    subject: Subject, task: Task, rows: Sequence[Encoded], after: Parts
) -> tuple[dict[str, Any], Evaluation, Evaluation]:
    """Rows under the run as it was and as it will be; also what `metrics.json` then holds of them."""
    was, now, frozen = subject.measure(task, rows), subject.measure(task, rows, after), subject.frozen(task, rows)
    metrics = now.metrics() | {"perplexity_frozen": frozen.metrics()["perplexity"], "examples": {"test": len(rows)}}
    return metrics, was, now


@one_at_a_time
def drop(run: Path, config: DropConfig) -> dict[str, Any]:
    """Take an expert out: what went to it goes where a gate without it sends it.

    Returns:
        `perplexity` {`before`, `after`, `tasks`}, `goes_to` {expert: share of what went to it}, `out`.

    Raises:
        ValueError: there is no such expert, or it is the last one of the gate.
    """
    subject = Subject.open(run, config.old, config.columns, config.rows)
    gone, less = subject.parts.number(config.name), parts.without(subject.parts, config.name)
    rows = subject.held()
    metrics, was, now = both(subject, subject.known(), rows, less)
    before = subject.weights(rows, "test").gate.argmax(-1) == gone
    after = subject.weights(rows, "test", less)
    chosen = ["the base" if lost >= 1 else less.names[int(gate.argmax())]
              for gate, lost, own in zip(after.gate, after.lost, before, strict=True) if own]  # fmt: skip
    said = {"perplexity": _told(was, now), "goes_to": {to: n / len(chosen) for to, n in Counter(chosen).most_common()}}
    out = write(subject, less, config.out, Change(f"experts drop {config.name}", said, metrics))
    return said | {"out": str(out)}


@one_at_a_time
def merge(run: Path, config: MergeConfig) -> dict[str, Any]:
    """One expert in place of two: it gets the sum of their weights, and is trained on what both were sent.

    Returns:
        `perplexity` {`before`, `after`, `tasks`}, `untrained` (perplexity with half of either's columns), `name`,
        `out`.

    Raises:
        ValueError: there are no such experts, or one is frozen.
    """
    subject = Subject.open(run, config.old, config.columns, config.rows)
    held = subject.parts
    pair = [held.number(config.first), held.number(config.second)]
    if kept := [held.names[i] for i in pair if held.names[i] in (held.config.frozen_experts or [])]:
        raise RunError(f"{kept[0]!r} is frozen, and merging changes it: `experts {run} freeze {kept[0]} --off` first")
    name = config.name or f"{config.first}+{config.second}"
    start = _half_of_each(held, pair)
    parts.merged(held, config.first, config.second, name, start)  # a wrong name is told before anything is trained
    task, columns = subject.known(), start
    if config.steps:
        joined = _sent_to(subject, pair)
        columns, _ = grow.trained(subject, joined, start, max(held.scale[i] for i in pair), config)
    one = parts.merged(held, config.first, config.second, name, columns)
    rows = subject.held()
    untrained = subject.measure(task, rows, parts.merged(held, config.first, config.second, name, start)).overall
    metrics, was, now = both(subject, task, rows, one)
    if added := [read for one, read in subject.added.items() if one in (config.first, config.second)]:
        subject.added[name] = torch.cat(added)
    said = {"perplexity": _told(was, now), "untrained": untrained, "name": name}
    seen = trained_on(config.old, config.columns, SHARE, 0, task) if config.old and config.steps else None
    change = Change(f"experts merge {config.first} {config.second}", said, metrics, seen)
    out = write(subject, one, config.out, change)
    return said | {"out": str(out)}


def _half_of_each(held: Parts, pair: Sequence[int]) -> dict[str, torch.Tensor]:
    """Every second column of the one, and of the other."""
    found = {}
    for name in COLUMNS:
        one, other = (held.columns(i)[name] for i in pair)
        found[name] = torch.where((torch.arange(len(one)) % 2 == 0).view(-1, 1, 1, 1).to(one.device), one, other)
    return found


def _sent_to(subject: Subject, pair: Sequence[int]) -> Task:
    """The training and validation rows that the gate sends to one of two experts, most of their weight.

    Raises:
        RunError: none of the training rows go to one of them.
    """
    task, found, held = subject.known(), dict[str, Any](), subject.parts
    for part in ("train", "validation"):
        rows = some(getattr(task, part), 4 * JOINED)
        if len(rows):
            of = subject.weights(rows, f"merge {part}").gate.argmax(-1).tolist()
            rows = [row for row, expert in zip(rows, of, strict=True) if expert in pair]
        if part == "train":
            later = {*held.routes[held.config.num_rows :]}  # the run's own data may know nothing of what they serve
            idle = [held.names[i] for i in pair if i not in of and (i in later or not rows)]
            if idle:
                raise RunError(f"no training instruction goes to {' or '.join(idle)}: give instructions that both "
                               "serve by --old DATA, or choose --steps 0 to merge them untrained")  # fmt: skip
        found[part] = some(rows, JOINED)
    return replace(task, train=found["train"], validation=found["validation"])


@one_at_a_time
def rename(run: Path, config: RenameConfig) -> dict[str, Any]:
    """Give an expert another name; nothing else changes.

    Raises:
        ValueError: there is no such expert, or one has that name.
    """
    subject = Subject.open(run, None, (), 1)
    changed = parts.renamed(subject.parts, config.name, config.to)
    subject.added = {config.to if name == config.name else name: read for name, read in subject.added.items()}
    out = write(subject, changed, config.out, Change(f"experts rename {config.name} {config.to}", {"name": config.to}))
    return {"experts": changed.names, "out": str(out)}


@one_at_a_time
def freeze(run: Path, config: FreezeConfig) -> dict[str, Any]:
    """Let further training leave an expert as it is, or with `off` train it again.

    Raises:
        ValueError: there is no such expert.
    """
    subject = Subject.open(run, None, (), 1)
    changed = parts.frozen(subject.parts, [config.name], config.off)
    frozen = changed.config.frozen_experts or []
    out = write(subject, changed, config.out, Change(f"experts freeze {config.name}", {"frozen": frozen}))
    return {"frozen": frozen, "out": str(out)}


@one_at_a_time
def calibrate(run: Path, config: CalibrateConfig) -> dict[str, Any]:
    """Set the null weight from which text is left to the base, from text that should be.

    Returns:
        `threshold`, `let_through` {`before`, `after`}, each {`unrelated`, `own`}: shares of your texts and of the run's
        own instructions (not trained on) that experts answer; `out`.

    Raises:
        ValueError: the run has no null expert, or answers as its base does.
    """
    subject = Subject.open(run, config.old, config.columns, config.rows)
    held = subject.parts
    if not held.config.null_expert or held.config.null_threshold <= 0:
        raise RunError(f"{run} has no null expert whose threshold could be set: train with --null-expert True")
    task, rows = subject.known(), subject.held()
    subject.unrelated(config.unrelated)
    names = {"unrelated": f"unrelated {config.unrelated}", "own": "test"}
    subject.read("test", rows)

    def weighed(threshold: float) -> dict[str, Weights]:
        parts.put(subject.model, replace(held, config=replace(held.config, null_threshold=threshold)))
        return {name: subject.weigh(subject.pooled[key]) for name, key in names.items()}

    raw = weighed(NEVER)
    at = claims.threshold(raw["own"].lost, raw["unrelated"].lost, config.lose)
    changed = replace(held, config=replace(held.config, null_threshold=at))
    shares = {when: {name: 1 - each.left() for name, each in weighed(threshold).items()}
              for when, threshold in (("before", held.config.null_threshold), ("after", at))}  # fmt: skip
    metrics, was, now = both(subject, task, rows, changed)
    said = {"threshold": at, "let_through": shares, "perplexity": _told(was, now)}
    out = write(subject, changed, config.out, Change("experts calibrate", said, metrics))
    return said | {"out": str(out)}
