"""What a training step costs with each kind of expert, on SmolLM2-135M-Instruct and the mixture of conflicting tasks.

    python benchmarks/experts.py [--base smollm2] [--threads 1]     writes experts.json and experts.md beside this file

All sides in one process, on the same batches, in turn, batch after batch: experts that are hidden states (the paper's),
keys and values seen by all text, and keys and values seen by answers alone. Each trains from states of the frozen half
that are there already, as in every epoch but the first.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "experiments" / "smollm2"))
SIDES: dict[str, dict[str, Any]] = {
    "hidden states": {"expert_kind": "hidden_states", "recovery_prompts": 0},
    "keys and values, seen by all": {"visible_to": "all"},
    "keys and values, seen by answers": {"visible_to": "answers"},
}
STEPS, WARM = 12, 2


def saved(model: Any, batch: dict[str, Any]) -> int:
    """Bytes that autograd keeps for the backward pass, weights left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch).loss.backward()
    return sum(kept.values())


def measure(base: str) -> dict[str, Any]:
    from run import Bench

    from smartmops.methods.baselines import parameter_groups
    from smartmops.preparing.adapting import adapt

    bench = Bench("mixture", base)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randperm(len(bench.task.train), generator=generator)[:4].tolist() for _ in range(STEPS + WARM)]
    found: dict[str, Any] = {"batches": STEPS, "sides": {}}
    times: dict[str, list[float]] = {}
    for name, settings in SIDES.items():  # one after another: an adapter changes the base it sits on
        config = replace(bench.config, **settings)
        model, _, _ = adapt(bench.task, config, config, 0)
        rows, collate = bench.task.feed(model)
        for chosen in batches:
            collate([rows[i] for i in chosen])  # states are made here, not in the step
        optimiser = torch.optim.AdamW(parameter_groups(model, config), weight_decay=0.0)
        model.train()
        times[name] = []
        for chosen in batches:
            started = time.perf_counter()
            batch = collate([rows[i] for i in chosen])
            model(**batch).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            times[name].append(time.perf_counter() - started)
        found["sides"][name] = {
            "seconds": times[name][WARM:], "median": median(times[name][WARM:]),
            "saved_bytes": saved(model, collate([rows[i] for i in batches[0]])),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }  # fmt: skip
        bench.task.base = model.base_model.unload().requires_grad_(False).eval()
    first = found["sides"]["hidden states"]
    found["ratios"] = {name: side["median"] / first["median"] for name, side in found["sides"].items()}
    found["memory_ratios"] = {name: side["saved_bytes"] / first["saved_bytes"] for name, side in found["sides"].items()}
    return found


def page(found: dict[str, Any]) -> str:
    lines = [
        "# A training step by kind of expert",
        "",
        "Written by `python benchmarks/experts.py`, in one process on the same batches: SmolLM2-135M-Instruct, mixture of "
        f"conflicting tasks, 4 examples a step, medians of {found['batches']} steps, {found['threads']} thread(s), float32. "
        "Every side trains from states of the frozen half that are there already. Memory is what autograd keeps for the "
        "backward pass.",
        "",
        "| experts | a step, s | of hidden states | kept for backward, MB | of hidden states | trained numbers |",
        "|---|---|---|---|---|---|",
    ]
    for name, side in found["sides"].items():
        lines.append(
            f"| {name} | {side['median']:.2f} | {found['ratios'][name]:.2f} | {side['saved_bytes'] / 1e6:.0f} | "
            f"{found['memory_ratios'][name]:.2f} | {side['trained']:,} |"
        )
    lines += ["", "Targets: keys and values at most 0.75 of hidden states, seen by answers alone at most 0.35.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    found = measure(chosen.base) | {"threads": chosen.threads}
    (HERE / "experts.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "experts.md").write_text(page(found))
    print(page(found))


if __name__ == "__main__":
    main()
