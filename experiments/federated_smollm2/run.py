"""Federated training on SmolLM2-135M-Instruct: quality by round and megabytes sent, over skews and methods. Resumable.

    python experiments/federated_smollm2/run.py SIZE [PARTITION ...]   run cells that have no result yet
    python experiments/federated_smollm2/run.py page                   write README.md and curves.png from results

SIZE is short (a quarter of an hour a cell or more) or long. 20 clients, of which 5 act in a round; seven tasks of
Super-NaturalInstructions (`../shared/data/superni/paper7`). A cell is a size, a partition, a method and a seed, and one file
in results/. All cells of a size share base, examples, draws of clients, batch size and local steps; rates are each
method's default.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[2] / "shared" / "data" / "superni" / "paper7"
SIZES: dict[str, dict[str, Any]] = {
    "short": {"rounds": 8, "local_steps": 6, "batch_size": 2, "limit": 350, "test_share": 0.2, "max_length": 300, "eval_every": 2},
    "long": {"rounds": 40, "local_steps": 20, "batch_size": 4, "limit": 2800, "test_share": 0.1, "max_length": 256,
             "eval_every": 4},
}  # fmt: skip
PARTITIONS: dict[str, dict[str, Any]] = {
    "dirichlet 0.1": {"partition": "dirichlet", "dirichlet_alpha": 0.1},
    "dirichlet 1.0": {"partition": "dirichlet", "dirichlet_alpha": 1.0},
    "skewed": {"partition": "skewed"},  # the paper's
}
METHODS: dict[str, dict[str, Any]] = {
    "FedPrompt": {"method": "fedprompt"},
    "FedLoRA": {"method": "fedlora"},
    "MoPs": {"method": "mops"},
    "MoPs, keys and values": {"method": "mops", "expert_kind": "keys_values"},
}
SEEDS = {"short": (0,), "long": (0, 1, 2)}


def cells(size: str) -> Iterator[tuple[str, str, int, Path]]:
    """Partition, method, seed and the file of the result."""
    for seed in SEEDS[size]:
        for partition in PARTITIONS:
            for method in METHODS:
                name = f"{size}-{partition}-{method}-{seed}".lower().replace(",", "").replace(" ", "-")
                yield partition, method, seed, HERE / "results" / f"{name}.json"


def cell(size: str, partition: str, method: str, seed: int) -> dict[str, Any]:
    """One federation; what the page needs of its metrics."""
    from smartmops.federated.federate import federate
    from smartmops.options.federation import FederateConfig

    began = time.perf_counter()
    with TemporaryDirectory() as folder:
        found = federate(FederateConfig(
            model="smollm2", data=str(DATA), out=Path(folder) / "run", clients=20, clients_per_round=5, seed=seed, data_seed=0,
            skip_empty=True, samples_per_task=0, **SIZES[size], **PARTITIONS[partition], **METHODS[method],
        ))  # fmt: skip
    rounds = [{"round": row["round"], "perplexity": row.get("perplexity", {}).get("overall"),
               "bytes": row.get("bytes_up", 0) + row.get("bytes_down", 0)} for row in found["rounds"]]  # fmt: skip
    return {"size": size, "partition": partition, "method": method, "seed": seed, "settings": SIZES[size], "rounds": rounds,
            "perplexity_frozen": found["perplexity_frozen"]["overall"], "perplexity": found["perplexity"]["overall"],
            "trainable_parameters": found["trainable_parameters"], "clients": found["clients"],
            "seconds": time.perf_counter() - began, "load": os.getloadavg()}  # fmt: skip


def run(size: str, partitions: list[str]) -> None:
    (HERE / "results").mkdir(exist_ok=True)
    for partition, method, seed, file in cells(size):
        if partition in partitions and not file.exists():
            file.write_text(json.dumps(cell(size, partition, method, seed), indent=1) + "\n")
            print(file.name, flush=True)


# ---------------------------------------------------------------------------------------------------------------- page
def ends(size: str) -> str:
    """The last perplexity of every method, by partition, best first."""
    found: dict[str, list[tuple[float, str]]] = {}
    for partition, method, _, file in cells(size):
        if file.exists():
            found.setdefault(partition, []).append((json.loads(file.read_text())["perplexity"], method))
    return "; ".join(f"{partition}: " + ", ".join(f"{method} {value:.2f}" for value, method in sorted(own))
                     for partition, own in found.items())  # fmt: skip


def lines() -> Iterator[str]:
    yield "# Federated training on SmolLM2-135M-Instruct\n"
    if told := ends("short"):
        yield f"Perplexity after the short runs, best first (one seed): {told}.\n"
    yield "Written by `python experiments/federated_smollm2/run.py page` from `results/`.\n"
    yield ("20 clients, of which 5 act in a round; seven tasks of Super-NaturalInstructions, dealt out by Dirichlet over tasks or "
           "skewed as in the paper; perplexity on the server's test split. Each method at its own default rate, none tuned "
           "here. Megabytes are those sent in both directions by all rounds together.\n")  # fmt: skip
    for size, setting in SIZES.items():
        yield f"## {size}\n"
        yield (f"{setting['rounds']} rounds of {setting['local_steps']} local steps of {setting['batch_size']} examples; "
               f"{setting['limit']:,} examples, of which {100 * setting['test_share']:.0f} % are the test split.\n")  # fmt: skip
        there = {place: json.loads(place[3].read_text()) for place in cells(size) if place[3].exists()}
        missing = [f"{p} / {m} / seed {s}" for p, m, s, file in cells(size) if not file.exists()]
        if there:
            yield "| partition | method | seed | trained numbers | perplexity of the base | after, by round | MB sent | s |"
            yield "|---" * 8 + "|"
        for (partition, method, seed, _), found in there.items():
            after = ", ".join(
                f"{r['round']}: {r['perplexity']:.2f}" for r in found["rounds"] if r["perplexity"] and r["round"]
            )
            sent = sum(r["bytes"] for r in found["rounds"]) / 1e6
            yield (f"| {partition} | {method} | {seed} | {found['trainable_parameters']:,} | {found['perplexity_frozen']:.2f} | "
                   f"{after} | {sent:.1f} | {found['seconds']:.0f} |")  # fmt: skip
        if missing:
            yield f"\n**Not run:** {len(missing)} of {len(there) + len(missing)} cells: {'; '.join(missing)}.\n"
        if size == "short" and there:
            yield "\nOne seed and a few rounds: no comparison of methods to rely on.\n\n![Perplexity over megabytes](curves.png)\n"


def picture() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    figure, panels = plt.subplots(1, len(PARTITIONS), figsize=(11, 3.2), sharex=True, sharey=True, layout="constrained")
    colours = dict(zip(METHODS, ("#8a8a8a", "#009e73", "#0072b2", "#d55e00"), strict=True))
    for panel, partition in zip(panels, PARTITIONS, strict=True):
        panel.set(title=partition, xlabel="megabytes sent", xscale="log")
        panel.spines[["top", "right"]].set_visible(False)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for name, method, _, file in cells("short"):
            if name == partition and file.exists():
                rows = json.loads(file.read_text())["rounds"]
                sent = list(accumulate(row["bytes"] / 1e6 for row in rows))
                seen = [
                    (mb, row["perplexity"])
                    for mb, row in zip(sent, rows, strict=True)
                    if row["perplexity"] and row["round"]
                ]
                panel.plot(*zip(*seen, strict=True), "o-", color=colours[method], label=method)
    panels[0].set_ylabel("perplexity on the test split")
    for panel in panels:
        if panel.lines:
            panel.legend(frameon=False, fontsize=8)
        else:
            panel.text(0.5, 0.5, "not run", transform=panel.transAxes, ha="center")
    figure.savefig(HERE / "curves.png", dpi=110)


if __name__ == "__main__":
    words = sys.argv[1:]
    if words == ["page"]:
        if any(file.exists() for *_, file in cells("short")):
            picture()
        (HERE / "README.md").write_text("\n".join(lines()) + "\n")
    elif words[:1] and words[0] in SIZES and set(words[1:]) <= set(PARTITIONS):
        run(words[0], words[1:] or list(PARTITIONS))
    else:
        sys.exit(__doc__)
