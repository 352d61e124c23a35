"""Several methods on one frozen base and one data set, over seeds: same data, steps, budget and seeds for each."""

from __future__ import annotations

import random
import shutil
import time
from collections import defaultdict
from dataclasses import replace
from functools import partial
from statistics import mean
from typing import Any

from smartmops.base import load_base
from smartmops.compression.layerwise import prune
from smartmops.compression.solvers import Pattern
from smartmops.evaluation.perplexity import Evaluation, evaluate
from smartmops.fitting.stages import Stages
from smartmops.options.training import CompareConfig
from smartmops.progress.bars import console
from smartmops.reading.early import check_split
from smartmops.reading.task import Task, same_inputs
from smartmops.runs.card import keep, number
from smartmops.runs.folder import Run
from smartmops.tokens.batches import Encoded, few_shot
from smartmops.traits import compared

from .steps import Adapted, Frozen, adapted, begun, fitted, opened, shown


def shots_of(task: Task, count: int, max_length: int) -> list[Encoded]:
    """Each test example after `count` solved training examples of its own task, drawn at random, or all there are."""
    rng, by_task = random.Random(0), defaultdict(list)
    for example in task.train_examples:
        by_task[example.category].append(example)
    return [
        few_shot(example, rng.sample(own, min(count, len(own))), task.tokenizer, max_length, task.template)
        for example in task.test_examples
        for own in (by_task[example.category],)
    ]


def _opened(config: CompareConfig, run: Run) -> tuple[Task, CompareConfig]:
    """`opened`, on the base pruned if asked for, which is then kept in the run folder."""
    base, tokenizer = load_base(config.model, config.dtype)
    if config.sparsity is not None:
        prune(base, [], Pattern.parse(config.sparsity), "magnitude")
        console.print(f"pruned by magnitude: {config.sparsity:.1%} zeros in the decoder's linear layers")
        folder = run.path / "base"
        shutil.rmtree(folder, ignore_errors=True)
        base.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        base, tokenizer = load_base(str(folder), config.dtype)
    return opened(config, base, tokenizer)


def compare(config: CompareConfig) -> dict[str, Any]:
    """Evaluate the frozen base, train each method under each seed, write a run folder; returns its metrics.

    Raises:
        ValueError: data, options or base do not fit, or a measure is asked for that only `train` takes.
    """
    with begun("compare", config, ", ".join(config.compared), seeds=list(config.seeds)) as run:
        return run.read_metrics() or _compare(config, run)


def _compare(config: CompareConfig, run: Run) -> dict[str, Any]:
    """`compare`, in a run that is not finished."""
    run.rewind(0)
    task, config = _opened(config, run)
    same_inputs(run, task, config.unrelated)
    check_split(config, len(task.train), len(task.test), 1)
    found: dict[str, list[Evaluation]] = {"frozen": []}
    if config.shots:
        length = getattr(task.base.config, "max_position_embeddings", 4096)
        rows = shots_of(task, config.shots, length)
        found["four_in_context" if config.shots == 4 else f"{config.shots}_in_context"] = [
            evaluate(task.base, rows, task.collator)
        ]
    frozen: Frozen | None = None
    gains: dict[str, list[dict[str, Any]]] = defaultdict(list)
    seconds: dict[str, list[float]] = defaultdict(list)
    for seed in config.seeds:
        for method, rate in config.compared.items():
            started = time.perf_counter()
            name = compared(method)
            settings = replace(config, method=method, prompt_lr=rate, seed=seed)
            made, frozen = adapted(task, settings, frozen)
            result, said = _one(made, settings, name, run, frozen)
            base = made.model.base_model
            base = base if made.model.active_peft_config.is_prompt_learning else base.unload()
            task.base = base.requires_grad_(False).eval()
            found.setdefault(name, []).append(result)
            gains[name].append(said)
            seconds[name].append(time.perf_counter() - started)
            console.print(f"seed {seed} {name}: perplexity {result.overall:.3f}{_told(said)}")
    assert frozen is not None
    found["frozen"] = [frozen.test]
    metrics = summary(found) | {
        "seeds": list(config.seeds),
        "seconds": dict(seconds),
        "tokens": frozen.test.tokens,
        "examples": task.counts,
        **config.measured_on,
    }
    if frozen.validation:
        metrics["validation"] = dict(gains)
    if "mops" in config.compared:
        number(run, task.template, metrics)
    run.write_metrics(metrics)
    return metrics


def _told(said: dict[str, Any]) -> str:
    """What the state that counts is, where validation chose it."""
    if not said:
        return ""
    step = said["best"]["step"]
    return f", best at step {step}" if said["gained"] else ", nothing gained on validation data over the frozen base"


def _one(
    made: Adapted, config: CompareConfig, name: str, run: Run, frozen: Frozen
) -> tuple[Evaluation, dict[str, Any]]:  # fmt: skip
    """Fit and measure one method under one seed; the first seed's MoPs leaves adapter, gates and samples.

    Also returned: what validation says of this method.
    """
    task, model = made.task, made.model
    kept = config.traits.learned and config.seed == config.seeds[0]
    stages = Stages(run, task, model, made.names) if kept else None
    folder = run.checkpoints / f"{name}-{config.seed}"
    write = partial(run.append_curve, method=name, seed=config.seed)
    said = fitted(made, config, folder, write, frozen.validation)
    result = made.measured(task.test)
    if stages:
        keep(run, model, task.template)
        stages.write("after", accuracy=made.accuracy)
        shown(run, task, model, config)
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
