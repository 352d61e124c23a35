"""Several methods on one frozen base and one data set, over seeds: same data, steps, budget and seeds for each."""

from __future__ import annotations

import random
import shutil
import time
from collections import defaultdict
from dataclasses import asdict, replace
from statistics import mean
from typing import Any

from smartmops.base import load_base
from smartmops.checks.limits import check
from smartmops.checks.lock import alone
from smartmops.compression.layerwise import prune
from smartmops.compression.solvers import Pattern
from smartmops.evaluation.measure import gates
from smartmops.evaluation.perplexity import Evaluation, evaluate, samples
from smartmops.options.training import CompareConfig
from smartmops.preparing import gating
from smartmops.preparing.adapting import adapt, recovered
from smartmops.preparing.selection import told
from smartmops.progress.bars import console
from smartmops.reading.early import check_split
from smartmops.reading.task import Task
from smartmops.runs.card import keep
from smartmops.runs.folder import Run
from smartmops.states.fingerprint import inputs_of
from smartmops.tokens.batches import Encoded, few_shot
from smartmops.traits import compared

from .trainer import learn


def shots_of(task: Task, count: int, max_length: int) -> list[Encoded]:
    """Each test example after `count` solved training examples of its own task, drawn at random."""
    rng, by_task = random.Random(0), defaultdict(list)
    for example in task.train_examples:
        by_task[example.category].append(example)
    return [
        few_shot(example, rng.sample(by_task[example.category], count), task.tokenizer, max_length, task.template)
        for example in task.test_examples
    ]


def prepare(config: CompareConfig, run: Run) -> Task:
    """Load the base, prune it if asked (the pruned base is kept in the run folder), and read the data."""
    base, tokenizer = load_base(config.model, config.dtype)
    if config.sparsity is not None:
        prune(base, [], Pattern.parse(config.sparsity), "magnitude")
        console.print(f"pruned by magnitude: {config.sparsity:.1%} zeros in the decoder's linear layers")
        folder = run.path / "base"
        shutil.rmtree(folder, ignore_errors=True)
        base.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        base, tokenizer = load_base(str(folder), config.dtype)
    return recovered(Task.load(config, base, tokenizer), config)


def compare(config: CompareConfig) -> dict[str, Any]:
    """Evaluate the frozen base, train each method under each seed, write a run folder; returns its metrics.

    Raises:
        ValueError: data, options or base do not fit, or a measure is asked for that only `train` takes.
    """
    check(config)
    with alone(config.out):
        return _compare(config)


def _compare(config: CompareConfig) -> dict[str, Any]:
    """`compare`, alone in the run folder."""
    run = Run.create(
        config.out,
        {"command": "compare", "arguments": asdict(config), "seeds": list(config.seeds), "base": config.model,
         "data": config.data, "method": ", ".join(config.compared)},
        config.resume,
    )  # fmt: skip
    if run.finished:
        return run.read_metrics()
    run.rewind(0)
    task = prepare(config, run)
    run.same_inputs(inputs_of(task))
    check_split(config, len(task.train), len(task.test), 1)
    marks = evaluate(task.base, task.validation, task.collator) if task.validation else None
    gains: dict[str, list[dict[str, Any]]] = defaultdict(list)
    found: dict[str, list[Evaluation]] = {"frozen": [evaluate(task.base, task.test, task.collator)]}
    if config.shots:
        length = getattr(task.base.config, "max_position_embeddings", 4096)
        rows = shots_of(task, config.shots, length)
        found["four_in_context" if config.shots == 4 else f"{config.shots}_in_context"] = [
            evaluate(task.base, rows, task.collator, batch_size=8)
        ]
    seconds: dict[str, list[float]] = defaultdict(list)
    for seed in config.seeds:
        for method, rate in config.compared.items():
            started = time.perf_counter()
            name = compared(method)
            settings = replace(config, method=method, prompt_lr=rate, seed=seed)
            result, said = _one(task, settings, name, run, marks)
            found.setdefault(name, []).append(result)
            gains[name].append(said)
            seconds[name].append(time.perf_counter() - started)
            console.print(f"seed {seed} {name}: perplexity {result.overall:.3f}{_told(said)}")
    metrics = summary(found) | {
        "seeds": list(config.seeds),
        "seconds": dict(seconds),
        "tokens": found["frozen"][0].tokens,
        "examples": {"train": len(task.train), "validation": len(task.validation), "test": len(task.test)},
    }
    if marks:
        metrics["validation"] = dict(gains)
    run.write_metrics(metrics)
    return metrics


def _told(said: dict[str, Any]) -> str:
    """What the state that counts is, where validation chose it."""
    if not said:
        return ""
    step = said["best"]["step"]
    return f", best at step {step}" if said["gained"] else ", nothing gained on validation data over the frozen base"


def _one(
    task: Task, config: CompareConfig, name: str, run: Run, marks: Evaluation | None
) -> tuple[Evaluation, dict[str, Any]]:
    """Adapt, train, evaluate one method under one seed; the first seed's MoPs leaves adapter, gates and samples.

    `marks` is the base's evaluation on validation data. Also returned: what validation says of this method.
    """
    shared, task = task, told(task, config, config.seed)
    model, names, accuracy = adapt(task, config, config, config.seed)
    kept = config.traits.learned and config.seed == config.seeds[0]
    before = gates(task, model) if kept else {}

    def write(row: dict[str, Any]) -> None:
        run.append_curve({"method": name, "seed": config.seed, **row})

    folder = run.checkpoints / f"{name}-{config.seed}"
    said = learn(task, model, config, folder, write, marks)
    result = evaluate(model, task.test, task.collator)
    if kept:
        keep(run, model, task.template)
        run.write_gates({"experts": names, "before": before, "after": gates(task, model), "accuracy": accuracy,
                         "left_to_base": gating.leaves(model)})  # fmt: skip
        if config.samples_per_task:
            run.write_samples(
                samples(model, task.tokenizer, task.test_examples, config.samples_per_task, task.template)
            )
    base = model.base_model if model.active_peft_config.is_prompt_learning else model.base_model.unload()
    shared.base = base.requires_grad_(False).eval()
    shutil.rmtree(folder, ignore_errors=True)
    return result, said


def summary(found: dict[str, list[Evaluation]]) -> dict[str, Any]:
    """Means over seeds, and every seed's value, as `metrics.json` of `quickstart` holds them."""
    return {
        "perplexity": {name: mean(e.overall for e in runs) for name, runs in found.items()},
        "per_task": {
            name: {task: mean(e.per_task[task] for e in runs) for task in runs[0].per_task}
            for name, runs in found.items()
        },
        "per_seed": {name: [e.overall for e in runs] for name, runs in found.items()},
    }
