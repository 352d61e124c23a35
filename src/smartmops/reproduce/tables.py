"""Results in, a Markdown table beside the paper's numbers out. Knows no model and runs nothing.

Every figure is made from the results given, so a table that was deleted comes back byte for byte.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .paper import printed

NAMES = {
    "prompt-tuning": "ungated", "fedprompt": "FedPrompt", "mops": "MoPs", "lora": "LoRA", "ia3": "IA3",
    "fedlora": "FedLoRA", "mops-expert-weighted": "MoPs, expert-weighted",
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


def gain(baseline: Mapping[int, float], method: Mapping[int, float]) -> str:
    """Reduction of the baseline's perplexity in percent, paired by seed: mean ± standard deviation.

    The paper divides by the smaller number instead, which makes its gains look larger.
    """
    both = sorted(baseline.keys() & method.keys())
    if not both:
        return "not run"
    found = [100 * (1 - method[seed] / baseline[seed]) for seed in both]
    return f"{statistics.mean(found):+.1f}" + (f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else "") + " %"


def table(
    name: str, found: Values, datas: Sequence[str], bases: Sequence[str], baseline: str, methods: Sequence[str],
    frozen: Mapping[tuple[str, str], float],
) -> Iterator[str]:  # fmt: skip
    """Lines of a table per data set: bases down; frozen, baseline, methods with their gains, and the paper's across."""
    for data in datas:
        heads = ["base", "frozen", NAMES.get(baseline, baseline)]
        heads += [text for m in methods for text in (NAMES.get(m, m), "gain")]
        heads += [f"paper, {NAMES.get(m, m)}" for m in (baseline, "mops")] + ["paper's gain, as ours"]
        yield f"### {data}\n"
        yield "| " + " | ".join(heads) + " |"
        yield "|---" * len(heads) + "|"
        for base in bases:
            yield "| " + " | ".join(_row(name, found, data, base, baseline, methods, frozen)) + " |"
        yield ""


def _row(name: str, found: Values, data: str, base: str, baseline: str, methods: Sequence[str],
         frozen: Mapping[tuple[str, str], float]) -> Iterator[str]:  # fmt: skip
    first = found.get((data, base, baseline), {})
    yield base
    yield figure(frozen[data, base]) if (data, base) in frozen else "not run"
    yield spread(first.values())
    for method in methods:
        own = found.get((data, base, method), {})
        yield spread(own.values())
        yield gain(first, own)
    theirs = [printed(name, data, method, base) for method in (baseline, "mops")]
    for value in theirs:
        yield "–" if value is None else figure(value)
    before, after = theirs
    yield "–" if before is None or after is None else f"{100 * (1 - after / before):+.1f} %"


def frozen_of(results: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """Perplexity of the frozen base on the same test examples, by data and base."""
    return {(each["data"], each["base"]): each["metrics"]["perplexity_frozen"]["overall"] for each in results}
