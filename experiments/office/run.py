"""The seven office tasks on the embedded base, dense and pruned: frozen, four in context, ungated prompts, MoPs.

    python experiments/office/run.py tune       learning rates, on a tenth of the training split   -> tuning.json
    python experiments/office/run.py compare    three seeds, each method at its own tuned rate     -> results.json
    python experiments/office/run.py table      the numbers as Markdown                            -> README.md
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

from smartmops.data.tasks import split
from smartmops.training.baselines import Method
from smartmops.training.compare import CompareConfig, compare
from smartmops.training.evaluate import evaluate
from smartmops.training.trainer import Task, TrainConfig, fit

HERE = Path(__file__).parent
RATES = (0.03, 0.1, 0.3)  # Adam, prompts from hidden states
SEEDS = (0, 1, 2)
BASES = {"dense": None, "magnitude 50 %": 0.5}
SETTING = {"model": "tiny", "data": "office", "steps": 300, "batch_size": 16, "recovery_prompts": 10, "save_every": 10**9}


def tune() -> None:
    """Each method at each rate, seed 0, judged on a tenth of the training split that it does not train on."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(out=Path(folder) / "run", **SETTING)
        task = Task.load(config)
        kept, held = split(task.train_examples, 0.1, seed=1)
        rows = dict(zip(task.train_examples, task.train, strict=True))
        task.train, task.test = [rows[e] for e in kept], [rows[e] for e in held]
        task.train_examples, task.test_examples = kept, held
        methods: tuple[Method, ...] = ("prompt-tuning", "mops")
        for method in methods:
            for rate in RATES:
                chosen = replace(config, method=method, prompt_lr=rate)
                model, _, _ = task.adapt(chosen, chosen, 0)
                fit(model, chosen, chosen, task.train, task.collator, Path(folder) / "checkpoints")
                perplexity = evaluate(model, task.test, task.collator).overall
                found.setdefault(method, {})[str(rate)] = perplexity
                print(method, rate, perplexity, flush=True)
                task.base = model.base_model.unload().requires_grad_(False).eval()
    best = {method: min(values, key=lambda rate: values[rate]) for method, values in found.items()}
    (HERE / "tuning.json").write_text(json.dumps({"validation_perplexity": found, "best": best}, indent=2) + "\n")


def run() -> None:
    """Every base, every seed, every method."""
    best = json.loads((HERE / "tuning.json").read_text())["best"]
    results = {}
    for name, sparsity in BASES.items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = compare(
                CompareConfig(
                    out=Path(folder) / "run",
                    seeds=SEEDS,
                    sparsity=sparsity,
                    methods={method: float(rate) for method, rate in best.items()},
                    samples_per_task=0,
                    **SETTING,
                )
            )
        (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def lines() -> Iterator[str]:
    """The tables, from the results files."""
    results = json.loads((HERE / "results.json").read_text())
    tuning = json.loads((HERE / "tuning.json").read_text())
    some = next(iter(results.values()))
    methods = list(some["perplexity"])
    yield "# Seven office tasks, one frozen model\n"
    yield "Written by `python experiments/office/run.py table` from `results.json` and `tuning.json`.\n"
    yield (
        f"Perplexity over response tokens of {some['examples']['test']} test examples; mean and sample standard deviation "
        f"over seeds {some['seeds']} of experts and training. The data split is the same throughout. "
        f"{SETTING['steps']} steps of {SETTING['batch_size']} examples, 70 prompts, injection layer 2 of 8, "
        f"{SETTING['recovery_prompts']} recovery prompts under both methods, each method at its own tuned rate.\n"
    )
    yield "| base | " + " | ".join(m.replace("_", " ") for m in methods) + " | MoPs against frozen | against ungated |"
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
    yield "Tuning (dense base, seed 0, a tenth of the training split held out):\n"
    rates = list(next(iter(tuning["validation_perplexity"].values())))
    yield "| method | " + " | ".join(f"rate {r}" for r in rates) + " |"
    yield "|---" * (len(rates) + 1) + "|"
    for method, values in tuning["validation_perplexity"].items():
        yield f"| {method} | " + " | ".join(f"{values[r]:.3f}" for r in rates) + " |"


if __name__ == "__main__":
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "tune":
        tune()
    elif command == "compare":
        run()
    elif command == "table":
        (HERE / "README.md").write_text("\n".join(lines()) + "\n")
    else:
        sys.exit(__doc__)
