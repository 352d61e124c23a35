"""Results in, tables beside the paper's numbers out. Knows no model and runs nothing.

Every figure is made from the results given, so a table that was deleted comes back byte for byte.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from smartmops.traits import LABELS, PROPOSED

from .page import Table
from .paper import printed

NAMES = {
    **LABELS, "prompt-tuning": "ungated", "input-prompt-tuning": "prompts at the input",
    "mops-expert-weighted": "MoPs, expert-weighted", "mops over lora": "MoPs over LoRA",
    "lora, tuned": "LoRA, tuned", "lora, tuned, same memory": "LoRA, tuned, same memory", "ia3, tuned": "IA3, tuned",
}  # fmt: skip
Values = dict[tuple[str, str, str], dict[int, float]]  # (data, base, method) -> seed -> perplexity


def perplexities(results: Iterable[Mapping[str, Any]]) -> Values:
    """Final perplexity over the response tokens of the test split, by data, base, method and seed."""
    found: Values = {}
    for each in results:
        key = (each["data"], each["base"], each["method"])
        found.setdefault(key, {})[each["seed"]] = each["metrics"]["perplexity"]["overall"]
    return found


def figure(value: float) -> str:
    """Four significant digits, and no fewer than one decimal below 1,000."""
    return f"{value:.{max(1, 3 - math.floor(math.log10(value)))}f}" if 0 < value < 1000 else f"{value:,.0f}"


def spread(values: Iterable[float]) -> str:
    """Mean and sample standard deviation over seeds (n - 1 in the denominator), and how many where it is one."""
    known = list(values)
    if not known:
        return "not run"
    mean = figure(statistics.mean(known))
    return f"{mean} ± {statistics.stdev(known):.2g}" if len(known) > 1 else f"{mean} (1 seed)"


def gains(baseline: Mapping[int, float], method: Mapping[int, float]) -> dict[int, float]:
    """Reduction of the baseline's perplexity in percent, by seed.

    The paper divides by the smaller number instead, which makes its gains look larger.
    """
    return {seed: 100 * (1 - method[seed] / baseline[seed]) for seed in sorted(baseline.keys() & method.keys())}


def gain(baseline: Mapping[int, float], method: Mapping[int, float]) -> str:
    """Mean ± standard deviation of `gains`."""
    found = list(gains(baseline, method).values())
    if not found:
        return "not run"
    return f"{statistics.mean(found):+.1f}" + (f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else "") + " %"


def label(method: str) -> str:
    """What tables call a method."""
    return NAMES.get(method, method)


def table(
    name: str, found: Values, data: str, bases: Sequence[str], baseline: str, methods: Sequence[str],
    frozen: Mapping[tuple[str, str], float],
) -> Table:  # fmt: skip
    """Bases down; frozen, baseline, methods with their gains, and the paper's numbers across."""
    every = (baseline, *methods)
    theirs = [m for m in every if any(printed(name, data, m, base) is not None for base in bases)]
    both = baseline in theirs and PROPOSED in theirs
    heads = ["base", "frozen", label(baseline)]
    heads += [text for m in methods for text in (label(m), "gain")]
    heads += [f"paper, {label(m)}" for m in theirs] + ["paper's gain, as ours"] * both
    rows = []
    for base in bases:
        first = found.get((data, base, baseline), {})
        row = [base, figure(frozen[data, base]) if (data, base) in frozen else "not run", spread(first.values())]
        for method in methods:
            own = found.get((data, base, method), {})
            row += [spread(own.values()), gain(first, own)]
        paper = {m: printed(name, data, m, base) for m in theirs}
        row += ["–" if value is None else figure(value) for value in paper.values()]
        if both:
            before, after = paper[baseline], paper[PROPOSED]
            row.append("–" if before is None or after is None else f"{100 * (1 - after / before):+.1f} %")
        rows.append(row)
    return Table(data, heads, rows)


def won(found: Values, baseline: str, method: str) -> tuple[int, int]:
    """In how many pairs of runs (same data, base and seed) the method's perplexity is below the baseline's, of all."""
    pairs = [
        (values[seed], found[data, base, baseline][seed])
        for (data, base, name), values in found.items() if name == method
        for seed in values if seed in found.get((data, base, baseline), {})
    ]  # fmt: skip
    return sum(own < other for own, other in pairs), len(pairs)


def frozen_of(results: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """Perplexity of the frozen base on the same test examples, by data and base."""
    return {(each["data"], each["base"]): each["metrics"]["perplexity_frozen"]["overall"] for each in results}
