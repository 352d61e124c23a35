"""The ablation on SmolLM2-135M-Instruct: one cell is a data set, a variant of settings and a seed. Resumable.

    python experiments/smollm2/run.py DATA VARIANT... [--seeds 0 1 2]     run cells that have no result yet
    python experiments/smollm2/run.py page                                write README.md and the picture from results

DATA is mixture, paper7 or dolly, read from ../shared/data. Every cell's result is one file in results/. All cells of a
data set share base, examples, order of drawing, batch size and steps; a seed is that of experts, gate and order.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from smartmops.base import load_base
from smartmops.data.tasks import read
from smartmops.evaluation.measure import measured
from smartmops.evaluation.perplexity import evaluate
from smartmops.fitting.loop import fit
from smartmops.options.training import TrainConfig
from smartmops.preparing.adapting import adapt
from smartmops.reading.task import Task
from smartmops.rows.example import Example

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[2] / "shared" / "data"
STEPS, BATCH = 150, 4
# Per data set: folder, examples of each task in training, validation and test, longest example in tokens, tasks that are
# only tested (nobody trains on them).
SETS: dict[str, dict[str, Any]] = {
    "mixture": {"path": "superni/sapt_superni", "train": 60, "validation": 15, "test": 30, "longest": 190,
                "unseen": ("task639_multi_woz_user_utterance_generation", "task181_outcome_extraction")},
    "paper7": {"path": "superni/paper7", "train": 40, "validation": 15, "test": 30, "longest": 290, "unseen": ()},
    "dolly": {"path": "dolly15k/dolly-15k.jsonl", "train": 80, "validation": 15, "test": 40, "longest": 190,
              "unseen": ("general_qa",)},
}  # fmt: skip
MOPS: dict[str, Any] = {"method": "mops"}
HALF: dict[str, Any] = MOPS | {"shared": 0.5}  # of the columns, from the experts to all
SEPARATE: dict[str, Any] = MOPS | {"prefix_attention": "separate"}
LINEAR: dict[str, Any] = MOPS | {"prefix_attention": "linear"}
UNGATED: dict[str, Any] = {"method": "prompt-tuning"}
LORA: dict[str, Any] = {"method": "lora", "lora_match": "memory", "lora_alpha": 16}
# Every family that is tuned has the same number of rates to choose from; the one without a number is the default's.
VARIANTS: dict[str, dict[str, Any]] = {
    "mops": MOPS,
    "ungated": UNGATED,
    "mops gate rate 0.03": MOPS | {"relative_gate_lr": 0.03},
    "mops gate rate 0.1": MOPS | {"relative_gate_lr": 0.1},
    "mops gate rate 0": MOPS | {"relative_gate_lr": 0.0},
    "mops shared half": HALF,
    "mops shared half gate rate 0.03": HALF | {"relative_gate_lr": 0.03},
    "mops separate": SEPARATE,
    "mops separate shared half": SEPARATE | {"shared": 0.5},
    "mops separate head rate 0.1": SEPARATE | {"head_lr": 0.1},
    "mops separate from the first layer": SEPARATE | {"injection_layer": 0},
    "mops linear": LINEAR,
    "mops hidden states": MOPS | {"expert_kind": "hidden_states"},
    "mops seen by all": MOPS | {"visible_to": "all"},
    "mops shared half seen by all": HALF | {"visible_to": "all"},
    "ungated seen by all": UNGATED | {"visible_to": "all"},
    "mops from the first layer": MOPS | {"injection_layer": 0},
    "mops shared half from the first layer": HALF | {"injection_layer": 0},
    "ungated from the first layer": UNGATED | {"injection_layer": 0},
    "mops top-1": MOPS | {"gate_top_k": 1},
    "mops gate by gradient": MOPS | {"gate_start": "gradient"},
    "mops without null": MOPS | {"null_expert": False},
    "mops first column frozen": MOPS | {"freeze_first_column": True},
    "mops 30 columns": MOPS | {"prompts_per_expert": 30},
    "mops 600 steps": MOPS | {"steps": 600},
    "lora in all layers": LORA | {"lora_match": "parameters", "prompt_lr": 3e-3},
}
for rate in (0.01, 0.02, 0.06):
    VARIANTS[f"mops rate {rate:g}"] = MOPS | {"relative_lr": rate}
    VARIANTS[f"ungated rate {rate:g}"] = UNGATED | {"relative_lr": rate}
    VARIANTS[f"mops shared half rate {rate:g}"] = HALF | {"relative_lr": rate}
for rate in (0.01, 0.1):
    VARIANTS[f"mops separate rate {rate:g}"] = SEPARATE | {"relative_lr": rate}
    VARIANTS[f"mops linear rate {rate:g}"] = LINEAR | {"relative_lr": rate}
for rate in (3e-4, 1e-3, 3e-3, 1e-2):
    VARIANTS[f"lora rate {rate:g}"] = LORA | {"prompt_lr": rate}


def examples(name: str, tokenizer: Any) -> dict[str, list[Example]]:
    """Training, validation and test examples, of tasks nobody trains on (`unseen`) and of no task (`unrelated`)."""
    kind = SETS[name]
    every = read(str(DATA / kind["path"]), keep_general_qa=True)
    random.Random(0).shuffle(every)
    found: dict[str, list[Example]] = {part: [] for part in ("train", "validation", "test", "unseen")}
    taken: dict[str, int] = defaultdict(int)
    texts: set[str] = set()
    plan = [("test", kind["test"]), ("validation", kind["validation"]), ("train", kind["train"])]
    for example in every:
        text = f"{example.instruction}\n{example.context}"
        room = sum(count for _, count in plan)
        if taken[example.category] >= room or text in texts:
            continue
        if len(tokenizer(f"{text}\n{example.response}")["input_ids"]) > kind["longest"] - 30:
            continue
        texts.add(text)
        number, taken[example.category] = taken[example.category], taken[example.category] + 1
        ends = [(name, sum(c for _, c in plan[: i + 1])) for i, (name, _) in enumerate(plan)]
        part = next(name for name, end in ends if number < end)
        if example.category in kind["unseen"]:
            if part == "test":
                found["unseen"].append(example)
        else:
            found[part].append(example)
    few = {c for c in taken if sum(e.category == c for e in found["train"]) < 10} - set(kind["unseen"])
    for part in ("train", "validation", "test"):
        found[part] = [example for example in found[part] if example.category not in few]
    found["unrelated"] = paragraphs()
    return found


def paragraphs(count: int = 24) -> list[Example]:
    """Encyclopedic text of no task: the first half of a paragraph asked, the second answered."""
    lines = [line.strip() for line in (DATA / "text" / "wiki.test.raw").read_text(encoding="utf-8").splitlines()]
    chosen = [line for line in lines if 300 < len(line) < 500 and not line.startswith("=")]
    random.Random(0).shuffle(chosen)
    halves = [line.split(" ") for line in chosen[:count]]
    return [Example(" ".join(w[: len(w) // 2]), "", " ".join(w[len(w) // 2 :]), "wiki") for w in halves]


class Bench:
    """A base and a data set, shared by all cells."""

    def __init__(self, name: str, base: str) -> None:
        self.name = name
        model, tokenizer = load_base(base, "float32")
        self.parts = examples(name, tokenizer)
        self.tasks = sorted({example.category for example in self.parts["train"]})
        self.config = TrainConfig(
            model=base, data=name, out=HERE, experts=len(self.tasks), steps=STEPS, batch_size=BATCH, validation_share=0.0,
            max_length=SETS[name]["longest"] + 30, log_every=50,
        )  # fmt: skip
        self.task = Task.of(model, tokenizer, self.parts["train"], self.parts["test"], self.config)
        self.rows = {
            part: Task.of(model, tokenizer, [], self.parts[part], self.config).test
            for part in ("validation", "unseen", "unrelated")
            if self.parts[part]
        } | {"test": self.task.test}

    def settings(self, variant: str) -> dict[str, Any]:
        """Of a variant; `shared` moves that share of the columns from the experts to all."""
        found = dict(VARIANTS[variant])
        if share := found.pop("shared", None):
            columns = self.config.experts * self.config.prompts_per_expert
            found["prompts_per_expert"] = round(self.config.prompts_per_expert * (1 - share))
            found["shared_prompts"] = columns - self.config.experts * found["prompts_per_expert"]
        return found

    def measure(self, model: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for part, rows in self.rows.items():
            adapted = hasattr(model, "base_model") and hasattr(model.base_model, "nats")
            result = measured(self.task, model, rows) if adapted else evaluate(model, rows, self.task.collator)
            found[part] = {"overall": result.overall, "per_task": result.per_task, "tokens": result.tokens}
        return found

    def cell(self, variant: str, seed: int) -> dict[str, Any]:
        started = time.perf_counter()
        if variant == "frozen":
            return {"measured": self.measure(self.task.base), "seconds": {"all": time.perf_counter() - started}}
        config = replace(self.config, seed=seed, **self.settings(variant))
        model, _, accuracy = adapt(self.task, config, config, seed)
        prepared = time.perf_counter()
        curve: list[dict[str, Any]] = []
        with TemporaryDirectory() as folder:
            fit(model, config, config, *self.task.feed(model), Path(folder), curve.append)
        trained = time.perf_counter()
        found = {
            "measured": self.measure(model), "gate_accuracy": accuracy, "curve": curve,
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "seconds": {"prepare": prepared - started, "train": trained - prepared,
                        "evaluate": time.perf_counter() - trained},
        }  # fmt: skip
        self.task.base = model.base_model.unload().requires_grad_(False).eval()
        return found


def file_of(data: str, variant: str, seed: int) -> Path:
    return HERE / "results" / data / f"{variant.replace(' ', '-')}-{seed}.json"


def run(bench: Bench, variant: str, seed: int) -> dict[str, Any]:
    """One cell, measured and written."""
    result = {"data": bench.name, "variant": variant, "seed": seed, "steps": STEPS, "batch_size": BATCH,
              "examples": {part: len(rows) for part, rows in bench.parts.items()}, "tasks": bench.tasks,
              "settings": {} if variant == "frozen" else bench.settings(variant),
              "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"}  # fmt: skip
    result |= bench.cell(variant, seed)
    file = file_of(bench.name, variant, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".tmp")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(file)
    values = {part: round(found["overall"], 3) for part, found in result["measured"].items()}
    seconds = {part: round(value) for part, value in result["seconds"].items()}
    print(bench.name, variant, seed, values, seconds, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=[*SETS, "page"])
    parser.add_argument("variants", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    if chosen.data == "page":
        from page import write

        write(HERE)
        return
    torch.set_num_threads(chosen.threads)
    bench = None
    for seed in chosen.seeds:
        for variant in chosen.variants:
            if file_of(chosen.data, variant, seed).exists() or (variant == "frozen" and seed):
                continue
            bench = bench or Bench(chosen.data, chosen.base)
            run(bench, variant, seed)


if __name__ == "__main__":
    main()
