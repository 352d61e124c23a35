"""The seven office tasks on the embedded base, dense and pruned: frozen, four in context, ungated prompts, MoPs.

python experiments/office/run.py tune       learning rates, on a tenth of the training split   -> tuning.json
python experiments/office/run.py compare    three seeds, each method at its own tuned rate     -> results.json
python experiments/office/run.py table      the numbers as Markdown                            -> README.md
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

from smartmops.base import load_base
from smartmops.compression.layerwise import prune
from smartmops.compression.solvers import Pattern
from smartmops.data.tasks import split
from smartmops.evaluation.perplexity import evaluate
from smartmops.fitting.loop import fit
from smartmops.flow.compare import CompareConfig, compare
from smartmops.options.method import Method
from smartmops.options.training import EMBEDDED_SETTING, TrainConfig
from smartmops.preparing.adapting import adapt, recovered
from smartmops.reading.task import Task

HERE = Path(__file__).parent
RATES = {40: (0.3, 1.0, 3.0, 10.0), 20: (1.0, 3.0, 10.0), 160: (0.3, 1.0, 3.0)}  # Adam, by budget in optimiser steps
SEEDS = (0, 1, 2)
SETTING = {"model": "tiny", "dtype": "float32", "data": "office", "experts": 7, "batch_size": 16, "recovery_prompts": 10,
           "save_every": 10**9, **EMBEDDED_SETTING}  # fmt: skip


def tune() -> None:
    """Each method at each rate and budget, seed 0, judged on a tenth of the training split that it does not train on."""
    file = HERE / "tuning.json"
    found: dict[str, dict[str, dict[str, float]]] = json.loads(file.read_text()) if file.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(out=Path(folder) / "run", **SETTING)
        base, tokenizer = load_base("tiny", "float32")
        prune(base, [], Pattern.parse(0.5), "magnitude")
        task = recovered(Task.load(config, base, tokenizer), config)
        kept, held = split(task.train_examples, 0.1, seed=1)
        rows = dict(zip(task.train_examples, task.train, strict=True))
        task.train, task.test = [rows[e] for e in kept], [rows[e] for e in held]
        task.train_examples, task.test_examples = kept, held
        methods: tuple[Method, ...] = ("prompt-tuning", "mops")
        for budget, method, rate in ((b, m, r) for b, rates in RATES.items() for m in methods for r in rates):
            if str(rate) in found.get(str(budget), {}).get(method, {}):
                continue
            chosen = replace(config, method=method, prompt_lr=rate, steps=budget)
            model, _, _ = adapt(task, chosen, chosen, 0)
            fit(model, chosen, chosen, task.train, task.collator, Path(folder) / "checkpoints")
            perplexity = evaluate(model, task.test, task.collator).overall
            found.setdefault(str(budget), {}).setdefault(method, {})[str(rate)] = perplexity
            print("tuned", budget, method, rate, perplexity, flush=True)
            task.base = model.base_model.unload().requires_grad_(False).eval()
            file.write_text(json.dumps(found, indent=2) + "\n")


def run() -> None:
    """Every budget, base, seed and method, each method at the rate that was best at that budget."""
    tuning = json.loads((HERE / "tuning.json").read_text())
    file = HERE / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name, budget, sparsity in (("magnitude 50 %", 40, 0.5), ("magnitude 50 %", 20, 0.5), ("dense", 40, None),
                                   ("magnitude 50 %", 160, 0.5)):  # fmt: skip
        key = f"{name}, {budget} steps"
        if key in results:
            continue
        best = {method: float(min(values, key=values.get)) for method, values in tuning[str(budget)].items()}
        with tempfile.TemporaryDirectory() as folder:
            config = CompareConfig(out=Path(folder) / "run", seeds=SEEDS, sparsity=sparsity, methods=best, steps=budget,
                                   samples_per_task=0, **SETTING)  # fmt: skip
            results[key] = compare(config) | {"rates": best}
        file.write_text(json.dumps(results, indent=2) + "\n")


def lines() -> Iterator[str]:
    """The tables, from the results files."""
    results = json.loads((HERE / "results.json").read_text())
    tuning = json.loads((HERE / "tuning.json").read_text())
    some = next(iter(results.values()))
    methods = list(some["perplexity"])
    yield "# Seven office tasks, one frozen model\n"
    yield "Written by `python experiments/office/run.py table` from `results.json` and `tuning.json`.\n"
    yield (
        f"Perplexity over response tokens of {some['examples']['test']} test examples; mean and sample standard "
        f"deviation over seeds {some['seeds']} of experts and training, one data split. Steps of "
        f"{SETTING['batch_size']} examples, 70 prompts, injection layer 2 of 8, {SETTING['recovery_prompts']} recovery "
        "prompts, the same for both methods, each at the rate that was best for it at that budget.\n"
    )
    yield "| base, budget | " + " | ".join(m.replace("_", " ") for m in methods) + " | MoPs - frozen | MoPs - ungated |"
    yield "|---" * (len(methods) + 3) + "|"
    for base, found in results.items():
        cells = [
            f"{mean(v):.3f}" + (f" ± {stdev(v):.3f}" if len(v) > 1 else "")
            for v in (found["per_seed"][m] for m in methods)
        ]
        p = found["perplexity"]
        gains = [f"{100 * (p['mops'] / p[other] - 1):+.1f} %" for other in ("frozen", "ungated")]
        yield f"| {base} | " + " | ".join(cells + gains) + " |"
    yield "\nPer task:\n"
    for base, found in results.items():
        yield f"| {base} | " + " | ".join(m.replace("_", " ") for m in methods) + " |"
        yield "|---" * (len(methods) + 1) + "|"
        for task in some["tokens"]:
            yield f"| {task} | " + " | ".join(f"{found['per_task'][m][task]:.2f}" for m in methods) + " |"
        yield ""
    yield "Tuning (pruned base, seed 0, perplexity on a tenth of the training split held out):\n"
    rates = sorted({r for each in RATES.values() for r in each})
    yield "| steps, method | " + " | ".join(f"rate {r}" for r in rates) + " |"
    yield "|---" * (len(rates) + 1) + "|"
    for budget, found in tuning.items():
        for method, values in found.items():
            yield (
                f"| {budget}, {method} | "
                + " | ".join(f"{values[str(r)]:.3f}" if str(r) in values else "" for r in rates)
                + " |"
            )


def picture() -> None:
    """docs/office.png: perplexity of each method, by base and budget (left) and by task (right)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    results = json.loads((HERE / "results.json").read_text())
    shown = {"frozen": "#9aa3ad", "four_in_context": "#d9a441", "ungated": "#5b8cc0", "mops": "#2f9e77"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=[1, 1.7], constrained_layout=True)
    first = next(iter(results))
    for axis, groups, value in (
        (left, list(results), lambda group, method: results[group]["perplexity"][method]),
        (right, list(results[first]["tokens"]), lambda group, method: results[first]["per_task"][method][group]),
    ):
        for i, (method, colour) in enumerate(shown.items()):
            at = [place + 0.2 * i - 0.3 for place in range(len(groups))]
            heights = [value(group, method) - 1 for group in groups]
            spread = [stdev(results[g]["per_seed"][method]) if axis is left and i > 1 else 0 for g in groups]
            axis.bar(
                at, heights, 0.18, bottom=1, yerr=spread, color=colour, label=method.replace("_", " "), ecolor="#333"
            )
        axis.set_xticks(
            range(len(groups)),
            [g.replace("magnitude", "pruned").replace(", ", "\n").replace("_", "\n") for g in groups],
            fontsize=8,
        )
        axis.spines[["top", "right"]].set_visible(False)
        axis.set(ylim=(1, None), ylabel="perplexity over response tokens")
    right.legend(frameon=False, fontsize=9, loc="upper right")
    right.set_title(f"by task ({first})", fontsize=9)
    figure.savefig(HERE.parents[1] / "docs/office.png", dpi=130)


def numbers() -> None:
    """Put the first row's numbers into the project's README."""
    readme = HERE.parents[1] / "README.md"
    found = next(iter(json.loads((HERE / "results.json").read_text()).values()))
    names = {"frozen": "frozen", "ungated": "ungated prompts", "mops": "MoPs", "four_in_context": "four in context"}
    told = ", ".join(
        f"{name} {mean(found['per_seed'][m]):.2f}"
        + (f" ± {stdev(v):.2f}" if len(v := found["per_seed"][m]) > 1 else "")
        for m, name in names.items()
    )
    text = re.sub(r"(?<=<!-- numbers -->).*?(?=<!-- /numbers -->)", told, readme.read_text(), flags=re.S)
    readme.write_text(text)


if __name__ == "__main__":
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "tune":
        tune()
    elif command == "compare":
        run()
    elif command == "table":
        (HERE / "README.md").write_text("\n".join(lines()) + "\n")
        picture()
        numbers()
    else:
        sys.exit(__doc__)
