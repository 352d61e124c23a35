"""What a run's metrics say: perplexities by method and task with their spread, and one sentence about them.

Plain data in, plain data and words out. Knows the shapes of `metrics.json`; knows no model, no file and no page.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from smartmops.traits import LABELS, PROPOSED

# How a method is called in tables, and in the order in which they stand.
NAMES = {"frozen": "Frozen", "four_in_context": "Four in context", **LABELS}
_IN_PROSE = {
    "four_in_context": "four examples in context",
    "prompt-tuning": "prompt tuning",
    "ungated": "ungated prompts",
}


def name(method: str) -> str:
    """A method's name as it stands in tables."""
    return NAMES.get(method, method.replace("_", " "))


@dataclass(frozen=True)
class Estimate:
    """A perplexity over response tokens: a mean over seeds with its sample standard deviation, or one value.

    Attributes:
        mean: Mean over seeds.
        spread: Sample standard deviation over seeds (n - 1 in the denominator); None for one seed.
    """

    mean: float
    spread: float | None = None

    def __str__(self) -> str:
        return figure(self.mean) + ("" if self.spread is None else f"\u00a0±\u00a0{_decimals(self.spread, self.mean)}")


@dataclass(frozen=True)
class Results:
    """Perplexities of one run.

    Attributes:
        overall: By method.
        per_task: By method, then task; a method may be missing here.
        headline: The method the run is about: its own, or MoPs where several stand side by side.
        seeds: How many seeds the means are over.
    """

    overall: dict[str, Estimate]
    per_task: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    headline: str = ""
    seeds: int = 1

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods, the frozen model first."""
        return tuple(self.overall)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks in the order of the metrics."""
        return tuple(dict.fromkeys(task for row in self.per_task.values() for task in row))

    def change(self, method: str, task: str | None = None) -> float | None:
        """Change of perplexity against the frozen model in percent, overall or on one task; None where unknown."""
        rows = self.overall if task is None else {m: row[task] for m, row in self.per_task.items() if task in row}
        if method == "frozen" or method not in rows or "frozen" not in rows:
            return None
        return 100 * (rows[method].mean / rows["frozen"].mean - 1)

    def lowest(self, task: str | None = None) -> set[str]:
        """Methods with the lowest perplexity as printed: several where the printed figures are equal."""
        rows = self.overall if task is None else {m: row[task] for m, row in self.per_task.items() if task in row}
        best = min((e.mean for e in rows.values()), default=math.nan)
        return {m for m, e in rows.items() if figure(e.mean) == figure(best)} if len(rows) > 1 else set()


def read(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> Results:
    """Perplexities from `metrics.json`, in either of its shapes; empty where it has none.

    A run of one method has `perplexity` = {`overall`, `per_task`} and may have `perplexity_frozen` of the same shape;
    one of several has `perplexity` = {method: value}, `per_task` = {method: {task: value}} and may have `per_seed` =
    {method: [value per seed]}. Any value may itself be a list, one per seed.
    """
    perplexity = metrics.get("perplexity") or {}
    if "overall" in perplexity:
        own = str(config.get("method") or "adapted")
        parts = {"frozen": metrics.get("perplexity_frozen") or {}, own: perplexity}
        overall = {m: part["overall"] for m, part in parts.items() if "overall" in part}
        per_task = {m: part["per_task"] for m, part in parts.items() if part.get("per_task")}
    else:
        overall, per_task = dict(perplexity), dict(metrics.get("per_task") or {})
        own = PROPOSED if PROPOSED in overall else str(config.get("method") or "")
    per_seed = metrics.get("per_seed") or {}
    order = sorted(overall, key=lambda m: list(NAMES).index(m) if m in NAMES else len(NAMES))
    estimates = {m: _estimate(overall[m], per_seed.get(m)) for m in order}
    known = {m: e for m, e in estimates.items() if e is not None}
    return Results(
        known,
        {m: _row(per_task[m]) for m in known if per_task.get(m)},
        own if own in known else next(reversed(known), ""),
        max([len(v) for v in per_seed.values()] or [len(metrics.get("seeds") or [0])]),
    )


def summary(results: Results) -> str:
    """A few sentences about the result, made from its numbers; empty where there are none."""
    if not results.overall:
        return ""
    own, frozen = results.overall[results.headline], results.overall.get("frozen")
    subject, change = name(results.headline), results.change(results.headline)
    if frozen is None or change is None:
        first = f"{subject} reaches a perplexity of {own}"
    elif figure(own.mean) == figure(frozen.mean):
        first = f"{subject} leaves the frozen model’s perplexity at {own}"
    else:
        verb = "lowers" if change < 0 else "raises"
        first = f"{subject} {verb} the frozen model’s perplexity from {frozen} to {own} ({percent(change)})"
    others = {m: e for m, e in results.overall.items() if m not in (results.headline, "frozen")}
    listed = ", ".join(f"{_IN_PROSE.get(m, name(m))} {e}" for m, e in others.items())
    beside = f"For comparison: {listed}. " if others else ""
    return f"{first}. {beside}{_tasks_won(results)}".strip()


def _tasks_won(results: Results) -> str:
    tasks = results.tasks
    if len(tasks) < 2:
        return ""
    if len(results.per_task) > 1:
        lowest = [results.lowest(task) for task in tasks]
        won = sum(results.headline in each and not each & {"frozen"} - {results.headline} for each in lowest)
        return f"{name(results.headline)} has the lowest perplexity on {won} of {len(tasks)} tasks."
    row = next(iter(results.per_task.values()))
    low, high = min(row, key=lambda t: row[t].mean), max(row, key=lambda t: row[t].mean)
    return f"The lowest task is {label(low)} ({row[low]}), the highest {label(high)} ({row[high]})."


def label(task: str) -> str:
    """A task's name as it stands in tables."""
    return re.sub(r"\bqa\b", "QA", task.replace("_", " "))


def figure(value: float) -> str:
    """A perplexity as printed: two decimals below 10, one below 1000, else none."""
    return _decimals(value, value)


def percent(change: float) -> str:
    """A change in percent with its sign and a true minus; one decimal below 10 %."""
    text = f"{abs(change):.{1 if abs(change) < 9.95 else 0}f}"
    sign = "" if float(text) == 0 else "−" if change < 0 else "+"
    return f"{sign}{text}\u202f%"


def _decimals(value: float, of: float) -> str:
    places = 2 if of < 9.995 else 1 if of < 999.5 else 0
    return f"{value:,.{places}f}".replace(",", "\u202f")


def _row(values: Mapping[str, Any]) -> dict[str, Estimate]:
    found = {task: _estimate(value) for task, value in values.items()}
    return {task: estimate for task, estimate in found.items() if estimate is not None}


def _estimate(value: Any, seeds: Sequence[float | None] | None = None) -> Estimate | None:
    """Mean and spread of a value or of a list of values; None where every value is missing (a NaN stored as null)."""
    values = [float(v) for v in (seeds or (value if isinstance(value, list) else [])) if isinstance(v, int | float)]
    if isinstance(value, int | float):
        mean = float(value)
    elif values:
        mean = statistics.fmean(values)
    else:
        return None
    return Estimate(mean, statistics.stdev(values) if len(values) > 1 else None)
