"""Dolly-15k on the embedded base: frozen, ungated prompts at the same layer, PEFT's input prompt tuning, MoPs.

    python experiments/dolly/run.py train METHOD [--data FILE]   2,000 steps; resumes where it was killed -> work/METHOD
    python experiments/dolly/run.py table                        results.json, curves.png and README.md from work/

The same as `smartmops train tiny --data FILE --steps 2000 --limit 5000 --batch-size 1 --method METHOD ...`: 5,000 examples,
90 % to train and 10 % to test, one example a step, as in the paper (Experiments, "Datasets").
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smartmops.flow.trainer import TrainConfig, train
from smartmops.options.training import EMBEDDED_SETTING
from smartmops.runs.folder import Run

HERE = Path(__file__).parent
DATA = HERE.parents[2] / "shared/data/dolly15k/dolly-15k.jsonl"
RATES = {"mops": 0.1, "prompt-tuning": 0.1, "input-prompt-tuning": 0.03}  # Adam
METHODS = {
    "mops": "MoPs", "mops-fixed-gate": "MoPs, gate kept as pretrained", "prompt-tuning": "ungated, same layer",
    "input-prompt-tuning": "PEFT input prompts",
}  # fmt: skip


def config(method: str, data: str) -> TrainConfig:
    """One method; everything else is equal."""
    fixed: dict[str, Any] = {"gate_lr": 0.0} if method == "mops-fixed-gate" else {}
    name: Any = method.removesuffix("-fixed-gate")
    out = HERE / "work" / method
    return TrainConfig(
        model="tiny", data=data, out=out, method=name, steps=2000, batch_size=1, limit=5000,
        max_length=512, save_every=100, log_every=50, resume=out.exists(), prompt_lr=RATES[name],
        recovery_prompts=0, dtype="float32", **EMBEDDED_SETTING, **fixed,
    )  # fmt: skip


def collect() -> None:
    """Gather the finished runs' numbers and curves."""
    found: dict[str, Any] = {}
    for method in METHODS:
        if (HERE / "work" / method / "metrics.json").exists():
            run = Run.open(HERE / "work" / method)
            arguments = {k: v for k, v in run.config["arguments"].items() if k not in ("out", "data", "resume")}
            found[method] = {"metrics": run.read_metrics(), "curves": run.read_curves(), "arguments": arguments}
    (HERE / "results.json").write_text(json.dumps(found, indent=1) + "\n")


def lines() -> Iterator[str]:
    """The table, from results.json."""
    found = json.loads((HERE / "results.json").read_text())
    some = next(iter(found.values()))
    frozen, arguments = some["metrics"]["perplexity_frozen"], some["arguments"]
    count = some["metrics"]["examples"]
    yield "# Dolly-15k on the embedded base\n"
    yield "Written by `python experiments/dolly/run.py table` from `results.json`.\n"
    yield (
        f"Perplexity over response tokens of {count['test']} test examples; {count['train']} training examples "
        f"(of {arguments['limit']} drawn; the rest do not fit {arguments['max_length']} tokens without cutting a response), "
        f"{arguments['steps']} steps of {arguments['batch_size']}, seed {arguments['seed']}, one seed only. The base has 6 M "
        "parameters and knows little English: the frozen perplexity says how little.\n"
    )
    rates = {m: r["arguments"]["prompt_lr"] or "default" for m, r in found.items()}
    yield "| task | frozen | " + " | ".join(METHODS[m] for m in found) + " |"
    yield "|---" * (len(found) + 2) + "|"
    for task in frozen["per_task"]:
        cells = [f"{r['metrics']['perplexity']['per_task'][task]:.1f}" for r in found.values()]
        yield f"| {task} | {frozen['per_task'][task]:.1f} | " + " | ".join(cells) + " |"
    overall = [r["metrics"]["perplexity"]["overall"] for r in found.values()]
    yield f"| **overall** | {frozen['overall']:.2f} | " + " | ".join(f"{x:.2f}" for x in overall) + " |"
    gains = " | ".join(f"{100 * (x / frozen['overall'] - 1):+.1f} %" for x in overall)
    yield f"| against frozen | | {gains} |"
    yield "| learning rate | | " + " | ".join(str(rates[m]) for m in found) + " |"
    yield "\n![perplexity and loss by step](curves.png)"


def picture() -> None:
    """Test perplexity and training loss by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = json.loads((HERE / "results.json").read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for method, run in found.items():
        seen = [(r["step"], r["eval_perplexity"]) for r in run["curves"] if "eval_perplexity" in r]
        start = (0, run["metrics"]["perplexity_frozen"]["overall"])
        left.plot(*zip(*[start, *seen], strict=True), marker="o", ms=3, label=METHODS[method])
        loss = [(r["step"], r["loss"]) for r in run["curves"] if "loss" in r]
        right.plot(*zip(*loss, strict=True), lw=1, label=METHODS[method])
    left.set(xlabel="optimiser step (0: frozen)", ylabel="test perplexity over response tokens")
    right.set(xlabel="optimiser step", ylabel="training loss (nats per response token)")
    for axis in (left, right):
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "curves.png", dpi=130)


if __name__ == "__main__":
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "train" and len(sys.argv) > 2:
        train(config(sys.argv[2], sys.argv[4] if len(sys.argv) > 4 else str(DATA)))
    elif command == "table":
        collect()
        picture()
        (HERE / "README.md").write_text("\n".join(lines()) + "\n")
    else:
        sys.exit(__doc__)
