"""README.md and ablation.png from results/. Knows files and numbers; runs nothing."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cells import FROZEN

SETS = {
    "mixture": "Mixture of conflicting tasks (SAPT's Super-NaturalInstructions tasks)",
    "paper7": "The paper's Super-NaturalInstructions tasks (six of seven: examples of the other are longer than 260 tokens)",
    "dolly": "Dolly, seven categories",
}
FAR = 1.5  # times the lowest perplexity: what is above is written at the picture's edge
Found = dict[str, dict[int, dict[str, Any]]]  # variant -> seed -> result


def load(folder: Path) -> dict[str, Found]:
    found: dict[str, Found] = {}
    for file in sorted((folder / "results").glob("*/*.json")):
        result = json.loads(file.read_text())
        found.setdefault(result["data"], defaultdict(dict))[result["variant"]][result["seed"]] = result
    return found


def spread(values: list[float]) -> str:
    if not values:
        return ""  # the gate is told the task, so text of others cannot be asked
    if len(values) == 1:
        return f"{values[0]:.3g}" if values[0] < 100 else f"{values[0]:.0f}"
    return f"{mean(values):.2f} ± {stdev(values):.2f}"


def overall(runs: dict[int, dict[str, Any]], part: str) -> list[float]:
    return [run["measured"][part]["overall"] for run in runs.values() if part in run["measured"]]


def rows(found: Found) -> Iterator[str]:
    """A table of one data set, best on validation data first; the frozen model on top."""
    parts = ("validation", "test", "unseen", "unrelated")
    shown = [part for part in parts if overall(found["frozen"], part)]
    yield "| variant | seeds | " + " | ".join(shown) + " | tasks below frozen | trained numbers | training, s |"
    yield "|---|---|" + "---|" * (len(shown) + 3)
    names = sorted(found, key=lambda name: (name not in FROZEN, mean(overall(found[name], "validation"))))
    base = found["frozen"][0]["measured"]["test"]["per_task"]
    for name in names:
        runs = found[name]
        values = [spread(overall(runs, part)) for part in shown]
        below = [sum(v < base[t] for t, v in run["measured"]["test"]["per_task"].items()) for run in runs.values()]
        first = next(iter(runs.values()))
        count = f"{first['parameters']:,}" if "parameters" in first else ""
        seconds = f"{mean(r['seconds']['train'] for r in runs.values()):.0f}" if name not in FROZEN else ""
        tasks = "" if name == "frozen" else f"{min(below)} of {len(base)}"
        yield f"| {name} | {len(runs)} | " + " | ".join(values) + f" | {tasks} | {count} | {seconds} |"


def picture(found: dict[str, Found], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tallest = max(len(variants) for variants in found.values())
    figure, axes = pyplot.subplots(1, len(found), figsize=(7.4 * len(found), 1.4 + 0.24 * tallest), squeeze=False)
    for axis, (name, variants) in zip(axes[0], found.items(), strict=True):
        frozen = overall(variants["frozen"], "test")[0]
        kept = sorted((v for v in variants if v != "frozen"), key=lambda v: -mean(overall(variants[v], "test")))
        values = {variant: overall(variants[variant], "test") for variant in kept}
        every = [value for each in values.values() for value in each]
        low = min(every)
        high = max(value for value in every if value < FAR * low)
        right = high + 0.15 * (high - low)
        for at, variant in enumerate(kept):
            colour = "C0" if variant.startswith("mops") else "C1" if variant.startswith("lora") else "C7"
            if mean(values[variant]) > right:
                axis.annotate(f"{mean(values[variant]):.3g} \u2192", (right, at), ha="right", va="center", color=colour)
                continue
            axis.plot(values[variant], [at] * len(values[variant]), "o", color=colour, alpha=0.5)
            axis.plot([mean(values[variant])], [at], "|", color=colour, markersize=14)
        axis.set_yticks(range(len(kept)), kept, fontsize=8)
        axis.set_ylim(-0.7, len(kept) - 0.3)
        axis.set_xlim(low - 0.05 * (high - low), right)
        axis.set_title(f"{name} (frozen {frozen:.1f})")
        axis.set_xlabel("test perplexity, less is better")
        axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=90)


def devices(found: dict[str, Found]) -> str:
    """What the cells ran on, with how many."""
    counts = Counter(run["device"] for kinds in found.values() for runs in kinds.values() for run in runs.values())
    return " and ".join(f"{name} ({count} cells)" for name, count in counts.most_common())


def lines(found: dict[str, Found]) -> Iterator[str]:
    yield "# The ablation on SmolLM2-135M-Instruct\n"
    yield "Written by `python experiments/smollm2/run.py page` from the files in `results/`.\n"
    some = next(iter(next(iter(found.values())).values()))
    first = next(iter(some.values()))
    yield (
        f"Every cell: {first['steps']} steps of {first['batch_size']} examples, chat template, float32, the same examples, "
        "order of drawing and base (a variant that names another number of steps takes those). Cells ran on "
        f"{devices(found)}, several at once, so times compare only roughly. Perplexity over the answer's "
        "tokens with its end of turn. Variants stand in the order of their perplexity on validation data, by which they are chosen. `unseen` is text of tasks that nobody trained "
        "on, `unrelated` encyclopedic text of no task. `mops` are the defaults: an expert for each task, 10 columns of keys "
        "and values each in every layer from the 9th up, seen by answers alone, with a null expert; `ungated` has as many "
        "columns in one group and no gate; `lora` has as many trained numbers in the same layers, and is seen by "
        "instructions as well. A rate without a number is the default's.\n"
    )
    yield "![Perplexity of every variant](ablation.png)\n"
    for name, title in SETS.items():
        if name not in found or "frozen" not in found[name]:
            yield f"## {title}\n\nNot run.\n"
            continue
        one = found[name]["frozen"][0]
        counts = ", ".join(f"{count} {part}" for part, count in one["examples"].items())
        yield f"## {title}\n\n{len(one['tasks'])} tasks; examples: {counts}.\n"
        yield "\n".join(rows(found[name])) + "\n"


def write(folder: Path) -> None:
    import questions

    questions.write(folder, load(folder))
    found = {name: variants for name, variants in load(folder).items() if "frozen" in variants}
    found = {name: found[name] for name in SETS if name in found}
    picture(found, folder / "ablation.png")
    (folder / "README.md").write_text("\n".join(lines(found)))
