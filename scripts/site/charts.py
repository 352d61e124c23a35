"""The charts of docs/choosing.md, from results files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

import results
from results import by_hand, family, loaded, on, pruned
from svg import Drawing, curves, rows

FAMILIES = {"frozen": "frozen", "ungated": "ungated", "mops": "MoPs", "lora": "LoRA"}
SETS = results.SETS
COUNTS = ("1 expert", "2 experts", "mops", "14 experts", "28 experts")
PROMPTS = (1, 2, 5, 10, 20, 40)
PATTERNS = {
    "0.5": "50 %",
    "0.75": "75 %",
    "0.85": "85 %",
    "0.9": "90 %",
    "2:4": "2:4",
    "4:8": "4:8",
    "3:4": "3:4",
    "7:8": "7:8",
}


def drawn() -> dict[str, Drawing]:
    """All of them, by name."""
    return {"methods": methods(), "forgetting": forgetting(), "experts": experts(), "prompts": prompts(),
            "injection": injection(), "compression": compression()}  # fmt: skip


def relative(part: str) -> list[tuple[str, Mapping[str, Sequence[float]]]]:
    """By data and method, perplexities on a part as a share of the frozen model's."""
    found: list[tuple[str, Mapping[str, Sequence[float]]]] = []
    for data, what in SETS.items():
        frozen = on(data, "frozen", part)[0]
        found.append((what, {label: [value / frozen for value in on(data, family(data, name), part)]
                             for name, label in FAMILIES.items() if name != "frozen"}))  # fmt: skip
    return found


def methods() -> Drawing:
    """Quality on the tasks."""
    return rows("Tasks trained on: test perplexity (SmolLM2)", "perplexity as a share of the frozen model's; lower is better",
                relative("test"), ["ungated", "MoPs", "LoRA"], log=True)  # fmt: skip


def forgetting() -> Drawing:
    """What unrelated text pays."""
    return rows("Text of no task: perplexity after training (SmolLM2)",
                "perplexity as a share of the frozen model's; 1 is unchanged", relative("unrelated"),
                ["ungated", "MoPs", "LoRA"], log=True, mark=1.0)  # fmt: skip


def experts() -> Drawing:
    """Perplexity by number of experts, as a share of that with seven."""
    lines = {}
    for data, label in (("superni", "six tasks that conflict"), ("dolly", "Dolly")):
        seven = mean(by_hand(data, "mops"))
        lines[label] = [
            (count, mean(by_hand(data, name)) / seven) for count, name in zip((1, 2, 7, 14, 28), COUNTS, strict=True)
        ]
    return curves(
        "Perplexity by number of experts (embedded base, three seeds)",
        "experts",
        "against seven experts",
        lines,
        log=True,
    )


def prompts() -> Drawing:
    """Perplexity by prompts of each expert."""
    lines = {label: [(count, mean(by_hand("dolly", f"{name}, {count} prompts an expert"))) for count in PROMPTS]
             for name, label in (("prompt-tuning", "ungated"), ("mops", "MoPs"))}  # fmt: skip
    return curves(
        "Perplexity by prompts of an expert (embedded base, Dolly, one seed)",
        "prompts of an expert",
        "perplexity",
        lines,
        log=True,
    )


def injection() -> Drawing:
    """Perplexity by injection layer."""
    lines = {label: [(layer, mean(by_hand("dolly", f"{name} at layer {layer}"))) for layer in range(8)]
             for name, label in (("prompt-tuning", "ungated"), ("mops", "MoPs"))}  # fmt: skip
    return curves(
        "Perplexity by injection layer (embedded base of 8 layers, Dolly, one seed)",
        "injection layer, from 0",
        "perplexity",
        lines,
    )


def compression() -> Drawing:
    """Perplexity by pattern and solver."""
    dense = loaded("experiments/compression/results.json")["wiki"]["dense"]["perplexity"]
    found = [(name, {label: pruned(solver, setting) for solver, label in
                     (("sparsegpt", "SparseGPT"), ("wanda", "Wanda"), ("magnitude", "magnitude"))})
             for setting, name in PATTERNS.items()]  # fmt: skip
    return rows("What pruning costs (embedded base, Wikipedia text)", "perplexity; the line is the dense base",
                found, ["SparseGPT", "Wanda", "magnitude"], log=True, mark=dense)  # fmt: skip
