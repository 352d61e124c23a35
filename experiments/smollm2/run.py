"""The ablation on SmolLM2-135M-Instruct: one cell is a data set, a variant of settings and a seed. Resumable.

    python experiments/smollm2/run.py DATA VARIANT... [--seeds 0 1 2]     run cells that have no result yet
    python experiments/smollm2/run.py page                                write the pages and pictures from results
    python experiments/smollm2/run.py pack FOLDER                         write the examples of every data set into FOLDER

DATA is mixture, paper7 or dolly, or one of the data sets that ask a question (how many tasks, few examples, wrong
labels), read from ../shared/data or from the FOLDER of `pack` that EXAMPLES names. Every cell's result is one file in
results/. All cells of a data set share base, examples, order of drawing, batch size and steps; a seed is that of experts,
gate and order.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import set_seed

from smartmops.base import load_base
from smartmops.data.tasks import read
from smartmops.evaluation.measure import measured
from smartmops.evaluation.perplexity import evaluate
from smartmops.fitting.loop import fit
from smartmops.methods import targets
from smartmops.methods.baselines import matched, peft_config
from smartmops.options.training import TrainConfig
from smartmops.preparing.adapting import adapt
from smartmops.preparing.selection import told
from smartmops.reading.task import Task
from smartmops.rows.example import Example
from smartmops.states.states import States

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[2] / "shared" / "data"
STEPS, BATCH = 150, 4
# Per data set: folders, examples of each task in training, validation and test, longest example in tokens, tasks that are
# only tested (nobody trains on them). Where it differs: steps and batch size, how many tasks are drawn, the share of
# training examples that carry another task's label, the task whose training examples carry two labels.
MIXTURE: dict[str, Any] = {
    "path": ["superni/sapt_superni"], "train": 60, "validation": 15, "test": 30, "longest": 190,
    "unseen": ("task639_multi_woz_user_utterance_generation", "task181_outcome_extraction"),
}  # fmt: skip
SETS: dict[str, dict[str, Any]] = {
    "mixture": MIXTURE,
    "paper7": {"path": ["superni/paper7"], "train": 40, "validation": 15, "test": 30, "longest": 290, "unseen": ()},
    "dolly": {"path": ["dolly15k/dolly-15k.jsonl"], "train": 80, "validation": 15, "test": 40, "longest": 190,
              "unseen": ("general_qa",)},
    "wrong-10": MIXTURE | {"wrong": 0.1},
    "wrong-30": MIXTURE | {"wrong": 0.3},
    "split": MIXTURE | {"split": "task875_emotion_classification"},
}  # fmt: skip
for count, steps in ((8, 40), (32, 100), (128, 200)):
    SETS[f"few-{count}"] = MIXTURE | {"train": count, "steps": steps}
for count in (2, 4, 8, 16, 32):
    SETS[f"growth-{count}"] = {
        "path": ["superni/sapt_superni", "superni/ni_v1"], "train": 60, "validation": 5, "test": 20, "longest": 190,
        "unseen": (), "tasks": count, "steps": 100 + 10 * count, "batch": 8,
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
    "mops seen by all from the first layer": MOPS | {"visible_to": "all", "injection_layer": 0},
    "mops separate seen by all": SEPARATE | {"visible_to": "all"},
    "mops separate shared half from the first layer": SEPARATE | {"shared": 0.5, "injection_layer": 0},
    "ungated 30 columns": UNGATED | {"prompts_per_expert": 30},
    "ungated separate": UNGATED | {"prefix_attention": "separate"},
    "uniform gate": {"method": "uniform-gate"},
    "oracle": {"method": "oracle"},
    "nearest cluster": {"method": "nearest-cluster"},
    "mops by clusters": MOPS | {"gate_pretraining": "clusters"},
    "paper's literal": {
        "method": "mops", "expert_kind": "hidden_states", "gate_target": "hidden_states", "gate_input": "sequence",
        "expert_attention": "causal", "init": "random", "null_expert": False, "visible_to": "all",
    },
    "mops top-2": MOPS | {"gate_top_k": 2},
    "ungated 20 columns": UNGATED | {"experts": 2},
    "lora as 20 columns": LORA | {"experts": 2, "prompt_lr": 3e-3},
    "one lora for each task": LORA | {"prompt_lr": 3e-3, "apart": True},
    "activated lora": LORA | {"prompt_lr": 3e-3, "activated": True},
}  # fmt: skip
WHOLE: dict[str, Any] = {"prefix_attention": "separate", "visible_to": "all", "injection_layer": 0}
VARIANTS |= {
    "mops separate seen by all from the first layer": MOPS | WHOLE,
    "mops separate shared half seen by all from the first layer": HALF | WHOLE,
    "ungated separate seen by all from the first layer": UNGATED | WHOLE,
}
for rate in (0.01, 0.06, 0.1):
    VARIANTS[f"mops separate seen by all from the first layer rate {rate:g}"] = MOPS | WHOLE | {"relative_lr": rate}
for rate in (0.003, 0.01, 0.03):
    VARIANTS[f"ia3 rate {rate:g}"] = {"method": "ia3", "prompt_lr": rate}
    VARIANTS[f"input prompts rate {rate:g}"] = {"method": "input-prompt-tuning", "prompt_lr": rate}
    VARIANTS[f"prefix tuning rate {rate:g}"] = UNGATED | {"prompt_lr": rate, "peft_prefix": True}
OURS_ALONE = ("shared", "apart", "activated", "peft_prefix")  # what no option of `train` is called
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
    if folder := os.environ.get("EXAMPLES"):
        rows = json.loads((Path(folder) / f"{name}.json").read_text())
        return {part: [Example(**row | {"history": ()}) for row in found] for part, found in rows.items()}
    kind = SETS[name]
    every = [example for path in kind["path"] for example in read(str(DATA / path), keep_general_qa=True)]
    random.Random(0).shuffle(every)
    found: dict[str, list[Example]] = {part: [] for part in ("train", "validation", "test", "unseen")}
    taken: dict[str, int] = defaultdict(int)
    texts: set[str] = set()
    plan = [("test", kind["test"]), ("validation", kind["validation"]), ("train", kind["train"])]
    room = sum(count for _, count in plan)
    ends = [(name, sum(c for _, c in plan[: i + 1])) for i, (name, _) in enumerate(plan)]
    for example in every:
        text = f"{example.instruction}\n{example.context}"
        if taken[example.category] >= room or text in texts:
            continue
        if len(tokenizer(f"{text}\n{example.response}")["input_ids"]) > kind["longest"] - 30:
            continue
        texts.add(text)
        number, taken[example.category] = taken[example.category], taken[example.category] + 1
        part = next(name for name, end in ends if number < end)
        if example.category in kind["unseen"]:
            if part == "test":
                found["unseen"].append(example)
        else:
            found[part].append(example)
    kept = _tasks(kind, found["train"])
    for part in ("train", "validation", "test"):
        found[part] = [example for example in found[part] if example.category in kept]
    found["train"] = _labelled(kind, found["train"], sorted(kept))
    found["unrelated"] = paragraphs()
    return found


def _tasks(kind: dict[str, Any], train: list[Example]) -> set[str]:
    """Tasks with enough examples; of a set that draws some of them, those, each draw within the next larger one."""
    counts = Counter(example.category for example in train)
    if "tasks" not in kind:
        fewest = min(10, kind["train"])
        return {task for task, count in counts.items() if count >= fewest}
    full = sorted(task for task, count in counts.items() if count == kind["train"])
    random.Random(0).shuffle(full)
    return set(full[: kind["tasks"]])


def _labelled(kind: dict[str, Any], train: list[Example], tasks: list[str]) -> list[Example]:
    """Training examples with the labels that the set gives them; the gate and the experts' starts read these."""
    draw = random.Random(0)
    found = []
    for number, example in enumerate(train):
        label = example.category
        if draw.random() < kind.get("wrong", 0.0):
            label = draw.choice([task for task in tasks if task != label])
        if label == kind.get("split"):
            label = f"{label} {number % 2 + 1}"
        found.append(replace(example, category=label))
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
        self.name, kind = name, SETS[name]
        model, tokenizer = load_base(base, "float32")
        self.parts = examples(name, tokenizer)
        self.tasks = sorted({example.category for example in self.parts["train"]})
        self.steps, batch = kind.get("steps", STEPS), kind.get("batch", BATCH)
        self.config = TrainConfig(
            model=base, data=name, out=HERE, experts=len(self.tasks), steps=self.steps, batch_size=batch,
            validation_share=0.0, max_length=kind["longest"] + 30, log_every=50,
        )  # fmt: skip
        self.task = Task.of(model, tokenizer, self.parts["train"], self.parts["test"], self.config)
        self.rows = {
            part: Task.of(model, tokenizer, [], self.parts[part], self.config).test
            for part in ("validation", "unseen", "unrelated")
            if self.parts[part]
        } | {"test": self.task.test}

    def settings(self, variant: str) -> dict[str, Any]:
        """Of a variant; `shared` moves that share of the columns from the experts to all."""
        found = {key: value for key, value in VARIANTS[variant].items() if key not in OURS_ALONE}
        if share := VARIANTS[variant].get("shared"):
            columns = self.config.experts * self.config.prompts_per_expert
            found["prompts_per_expert"] = round(self.config.prompts_per_expert * (1 - share))
            found["shared_prompts"] = columns - self.config.experts * found["prompts_per_expert"]
        return found

    def measure(self, model: Any, task: Task, rows: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for part, own in rows.items():
            adapted = hasattr(model, "base_model") and hasattr(model.base_model, "nats")
            result = measured(task, model, own) if adapted else evaluate(model, own, task.collator)
            found[part] = {"overall": result.overall, "per_task": result.per_task, "tokens": result.tokens}
        return found

    def cell(self, variant: str, seed: int) -> dict[str, Any]:
        started = time.perf_counter()
        if variant == "frozen":
            measured = self.measure(self.task.base, self.task, self.rows)
            return {"measured": measured, "seconds": {"all": time.perf_counter() - started}}
        config = replace(self.config, seed=seed, **self.settings(variant))
        if VARIANTS[variant].get("apart"):
            return self.apart(config)
        task, rows = self.task, self.rows
        if config.traits.told:  # so text of other tasks cannot be asked
            task = told(replace(task, validation=rows["validation"]), config, seed)
            rows = {"validation": task.validation, "test": task.test}
        model, accuracy = self.adapted(task, variant, config)
        prepared = time.perf_counter()
        curve = self.fitted(task, model, config)
        trained = time.perf_counter()
        found = {
            "measured": self.measure(model, task, rows), "gate_accuracy": accuracy, "curve": curve,
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "seconds": {"prepare": prepared - started, "train": trained - prepared,
                        "evaluate": time.perf_counter() - trained},
        }  # fmt: skip
        self.bare(model)
        return found

    def adapted(self, task: Task, variant: str, config: TrainConfig) -> tuple[Any, float | None]:
        """A fresh adapter on the base, and how often its gate is right at the start."""
        chosen = VARIANTS[variant]
        if not (chosen.get("activated") or chosen.get("peft_prefix")):
            model, _, accuracy = adapt(task, config, config, config.seed)
            return model, accuracy
        set_seed(config.seed)
        if chosen.get("peft_prefix"):  # in all layers, so fewer columns for as many numbers
            layers = task.base.config.num_hidden_layers
            columns = round(config.experts * config.prompts_per_expert * 21 / layers)
            return get_peft_model(
                task.base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=columns)
            ), None
        adapter = peft_config(matched(task.base, config))
        adapter.alora_invocation_tokens = list(task.template.header_ids)
        targets.choose(task.base, adapter)
        return get_peft_model(task.base, adapter), None

    @staticmethod
    def fitted(task: Task, model: Any, config: TrainConfig) -> list[dict[str, Any]]:
        """Train; the curve of the loss."""
        curve: list[dict[str, Any]] = []
        with TemporaryDirectory() as folder:
            fit(model, config, config, *task.feed(model), Path(folder), curve.append)
        return curve

    def bare(self, model: Any) -> None:
        """Take the adapter off the base."""
        base = model.base_model.unload() if hasattr(model.base_model, "unload") else model.base_model
        self.task.base = base.requires_grad_(False).eval()

    def apart(self, config: TrainConfig) -> dict[str, Any]:
        """One LoRA for each task, told the task: together as many steps and trained numbers as one for all."""
        started = time.perf_counter()
        nats: dict[str, dict[str, tuple[float, int]]] = defaultdict(dict)
        own = replace(config, steps=round(config.steps / len(self.tasks)), experts=1)
        parameters = 0
        for name in self.tasks:
            train = [row for row in self.task.train if row.category == name]
            task = replace(self.task, train=train, states=States())
            model, _, _ = adapt(task, own, own, config.seed)
            parameters += sum(p.numel() for p in model.parameters() if p.requires_grad)
            self.fitted(task, model, own)
            rows = {part: [r for r in self.rows[part] if r.category == name] for part in ("validation", "test")}
            for part, found in self.measure(model, task, rows).items():
                tokens = sum(found["tokens"].values())
                nats[part][name] = (math.log(found["overall"]) * tokens, tokens)
            self.bare(model)
        measured = {
            part: {"overall": math.exp(sum(n for n, _ in own.values()) / sum(t for _, t in own.values())),
                   "per_task": {name: math.exp(n / t) for name, (n, t) in own.items()},
                   "tokens": {name: t for name, (_, t) in own.items()}}
            for part, own in nats.items()
        }  # fmt: skip
        return {"measured": measured, "parameters": parameters,
                "seconds": {"prepare": 0.0, "train": time.perf_counter() - started, "evaluate": 0.0}}  # fmt: skip


def pack(folder: Path, base: str) -> None:
    """The examples of every data set, for a machine without ../shared."""
    _, tokenizer = load_base(base, "float32")
    folder.mkdir(parents=True, exist_ok=True)
    for name in SETS:
        rows = {part: [asdict(example) for example in found] for part, found in examples(name, tokenizer).items()}
        (folder / f"{name}.json").write_text(json.dumps(rows))


def file_of(data: str, variant: str, seed: int) -> Path:
    return HERE / "results" / data / f"{variant.replace(' ', '-')}-{seed}.json"


def run(bench: Bench, variant: str, seed: int) -> dict[str, Any]:
    """One cell, measured and written."""
    result = {"data": bench.name, "variant": variant, "seed": seed, "steps": bench.steps,
              "batch_size": bench.config.batch_size,
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
    parser.add_argument("data", choices=[*SETS, "page", "pack"])
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
    if chosen.data == "pack":
        pack(Path(chosen.variants[0]), chosen.base)
        return
    bench = None
    for seed in chosen.seeds:
        for variant in chosen.variants:
            if file_of(chosen.data, variant, seed).exists() or (variant == "frozen" and seed):
                continue
            bench = bench or Bench(chosen.data, chosen.base)
            run(bench, variant, seed)


if __name__ == "__main__":
    main()
