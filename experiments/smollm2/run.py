"""The ablation on SmolLM2-135M-Instruct: one cell is a data set, a variant of settings and a seed. Resumable.

    python experiments/smollm2/run.py DATA VARIANT... [--seeds 0 1 2]     run cells that have no result yet
    python experiments/smollm2/run.py page                                write the pages and pictures from results
    python experiments/smollm2/run.py pack FOLDER                         write the examples of every data set into FOLDER
    python experiments/smollm2/run.py bases TEXT                          compress the base in every way, calibrated on TEXT

DATA is mixture, paper7 or dolly, or one of the data sets that ask a question (how many tasks, few examples, wrong
labels, compressed bases, generated answers), read from ../shared/data or from the FOLDER of `pack` that EXAMPLES names.
Compressed bases stand in the folder that BASES names, or in checkpoints/bases. Every cell's result is one file in
results/. All cells of a data set share base, examples, order of drawing, batch size and steps; a seed is that of experts,
gate and order.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import apart
import asked
import torch
from cells import BASES, BATCH, DATA, FROZEN, HERE, OURS_ALONE, SETS, STEPS, VARIANTS, examples
from peft import PrefixTuningConfig, get_peft_model
from transformers import set_seed

from smartmops.base import load_base
from smartmops.compression.compress import compress
from smartmops.evaluation.measure import measured
from smartmops.evaluation.perplexity import evaluate
from smartmops.fitting.loop import fit
from smartmops.methods import targets
from smartmops.methods.baselines import matched, peft_config
from smartmops.options.compression import CompressConfig, beside
from smartmops.options.training import TrainConfig
from smartmops.preparing.adapting import adapt
from smartmops.preparing.selection import told
from smartmops.reading.task import Task
from smartmops.runs.folder import write_text


class Bench:
    """A base and a data set, shared by all cells."""

    def __init__(self, name: str, base: str) -> None:
        self.name, kind = name, SETS[name]
        base = str(base_of(name, base))
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
        self.asked = asked.asked(self.task, kind["answers"]) if "answers" in kind else []

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
        if variant in FROZEN:
            return self.frozen(variant) | {"seconds": {"all": time.perf_counter() - started}}
        config = replace(self.config, seed=seed, **self.settings(variant))
        if VARIANTS[variant].get("mixed"):
            return apart.mixed(self, config)
        if VARIANTS[variant].get("apart"):
            return apart.run(self, config, told=not VARIANTS[variant].get("gated"))
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
        if self.asked:
            found["answers"] = asked.answers(task, model, self.asked)
            if config.traits.ours:
                found["cosines"] = asked.cosines(task, model, bool(config.shared_prompts))
        self.bare(model)
        return found

    def frozen(self, variant: str) -> dict[str, Any]:
        """The base, with or without words in front of what is asked."""
        base, given = self.task.base, self.asked
        rows = self.rows
        if variant == "frozen with 4 examples":  # of its task, so text of other tasks cannot be asked
            rows = {part: asked.with_shots(self.task, self.parts[part]) for part in ("validation", "test")}
            given = asked.taught(self.task, given)
        if variant == "frozen with a system prompt":
            rows = {part: asked.with_system(self.task, self.parts[part], self.name) for part in rows}
            given = asked.instructed(given, self.name)
        found = {"measured": self.measure(base, self.task, rows)}
        return found | ({"answers": asked.answers(self.task, base, given)} if given else {})

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


def base_of(data: str, base: str) -> str | Path:
    """The base, or what `bases` made of it for such a data set."""
    return folder_of_bases() / SETS[data]["base"] if "base" in SETS[data] else base


def folder_of_bases() -> Path:
    return Path(os.environ.get("BASES", HERE / "checkpoints" / "bases"))


def bases(base: str, calibration: Path) -> None:
    """Compress the base in every way that a data set asks for."""
    for name, settings in BASES.items():
        out = folder_of_bases() / name
        if not out.exists():
            found = compress(CompressConfig(model=base, out=out, calibration=str(calibration), sequences=32,
                                            sequence_length=512, resume=beside(out).exists(), **settings))  # fmt: skip
            print(name, found["perplexity_before"], found["perplexity_after"], found["sparsity"], flush=True)


def pack(folder: Path, base: str) -> None:
    """The examples of every data set, and text to compress with, for a machine without ../shared."""
    _, tokenizer = load_base(base, "float32")
    folder.mkdir(parents=True, exist_ok=True)
    with lzma.open(DATA / "text" / "wiki_en.txt.xz", "rt", encoding="utf-8") as text:
        (folder / "calibration.txt").write_text(text.read(2_000_000), encoding="utf-8")
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
              "settings": {} if variant in FROZEN else bench.settings(variant),
              "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"}  # fmt: skip
    result |= bench.cell(variant, seed)
    file = file_of(bench.name, variant, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(result, indent=1) + "\n")
    values = {part: round(found["overall"], 3) for part, found in result["measured"].items()}
    seconds = {part: round(value) for part, value in result["seconds"].items()}
    print(bench.name, variant, seed, values, seconds, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=[*SETS, "page", "pack", "bases"])
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
    if chosen.data == "bases":
        bases(chosen.base, Path(chosen.variants[0]))
        return
    bench = None
    for seed in chosen.seeds:
        for variant in chosen.variants:
            if file_of(chosen.data, variant, seed).exists() or (variant in FROZEN and seed):
                continue
            bench = bench or Bench(chosen.data, chosen.base)
            run(bench, variant, seed)


if __name__ == "__main__":
    main()
