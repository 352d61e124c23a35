"""Numbers of the results files of the repository, by what they are of. Knows where files lie; draws nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SMOLLM2 = ROOT / "experiments/smollm2/results"
SETS = {"mixture": "nine tasks that conflict", "paper7": "the paper's tasks", "dolly": "Dolly's seven categories"}


@cache
def loaded(path: str) -> Any:
    """A JSON file of the repository."""
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


@cache
def real(data: str) -> dict[str, dict[int, dict[str, Any]]]:
    """Cells on SmolLM2 of one data set: variant -> seed -> cell."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted((SMOLLM2 / data).glob("*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(cell["variant"], {})[cell["seed"]] = cell
    return found


def family(data: str, name: str) -> str:
    """Of a method's variants with as many seeds as its best-measured one, the lowest on validation data.

    For ungated prompts and MoPs the defaults count alone, since other variants change more than the rate.
    """
    found = real(data)
    if name in ("frozen", "ungated", "mops"):
        return name
    known = {each: seeds for each, seeds in found.items() if each.split(" rate ")[0] == name}
    most = max(len(seeds) for seeds in known.values())
    return min(
        (each for each in known if len(known[each]) == most), key=lambda each: mean(on(data, each, "validation"))
    )


def on(data: str, variant: str, part: str) -> list[float]:
    """Perplexities of a variant on `test`, `validation`, `unseen` or `unrelated`, by seed."""
    return [
        cell["measured"][part]["overall"] for _, cell in sorted(real(data)[variant].items()) if part in cell["measured"]
    ]


def answered(data: str, variant: str, what: str) -> list[float]:
    """`exact_match` or `rouge_l` of a variant's answers to the first test examples of each task, by seed."""
    return [cell["answers"][what]["overall"] for _, cell in sorted(real(f"{data}-answers")[variant].items())]


@cache
def small() -> dict[tuple[str, str, str, str], dict[int, float]]:
    """On the embedded base: (command, data, base, method) -> seed -> perplexity on the test split."""
    found: dict[tuple[str, str, str, str], dict[int, float]] = {}
    for path in sorted((ROOT / "experiments/evidence/results").glob("*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        if cell["seed"] >= 100:  # settings were tried with these
            continue
        key = (cell["command"], cell["data"], cell["base"], cell["method"])
        found.setdefault(key, {})[cell["seed"]] = cell["metrics"]["perplexity"]["overall"]
    return found


def by_hand(data: str, method: str, base: str = "dense", command: str = "train") -> list[float]:
    """Perplexities of a method on the embedded base, by seed; empty: not run."""
    return [value for _, value in sorted(small().get((command, data, base, method), {}).items())]


def said(values: Sequence[float]) -> str:
    """Mean and sample standard deviation over seeds."""
    if not values:
        return "not run"
    whole = figure(mean(values))
    return f"{whole} ± {stdev(values):.2g}" if len(values) > 1 else whole


def figure(value: float) -> str:
    """Three significant digits."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def change(values: Sequence[float], against: Sequence[float]) -> float:
    """Of means, in percent."""
    return 100 * (mean(values) / mean(against) - 1)


def signed(percent: float) -> str:
    """A change, with its sign."""
    return f"{percent:+.1f} %"


def below(values: Sequence[float], against: Sequence[float]) -> str:
    """In how many seeds the first is below the second."""
    pairs = list(zip(values, against, strict=True))
    return f"{sum(a < b for a, b in pairs)} of {len(pairs)} seeds"


def pruned(method: str, setting: str, key: str = "perplexity") -> list[float]:
    """Perplexities on held-out Wikipedia text of the pruned embedded base, by draw of calibration text."""
    return [cell[key] for name, cell in sorted(loaded("experiments/compression/results.json")["wiki"].items())
            if name.startswith(f"{method}/{setting}/") and key in cell]  # fmt: skip


def claim(holds: bool, words: str) -> str:
    """Words that results have to carry.

    Raises:
        ValueError: they no longer do, so the page has to be written anew by hand.
    """
    if not holds:
        raise ValueError(f"the results no longer say {words!r}: read them, and change scripts/site/choosing.py")
    return words


def worded(ours: Sequence[float], other: Sequence[float]) -> str:
    """How the first mean lies to the second; `level with` where they differ by less than either's spread."""
    percent = change(ours, other)
    spread = max((max(each) - min(each)) / 2 for each in (ours, other))
    if abs(mean(ours) - mean(other)) <= spread:
        return f"level with ({signed(percent)})"
    return f"{abs(percent):.1f} % {'above' if percent > 0 else 'below'}"


def means(data: str, part: str, families: Iterable[str]) -> dict[str, float]:
    """Of each family, over seeds."""
    return {name: mean(on(data, family(data, name), part)) for name in families}
