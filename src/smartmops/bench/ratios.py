"""Ratios on a random Llama, each with its target.

Every section takes the laboratory and the ratios wanted of it, and returns those with the numbers they are made of.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.filesize import decimal

from smartmops.attention.packed import IGNORED
from smartmops.options.bench import POSITIONS
from smartmops.options.method import GatePretraining
from smartmops.preparing.pretrain import pretrain_gate, standardise
from smartmops.progress.bars import console
from smartmops.states.activations import ActivationCache, free_memory
from smartmops.tokens.batches import Encoded

from .sides import (
    Lab,
    alternate,
    clocked,
    generate,
    in_place,
    matmul_rate,
    prefill,
    rise,
    slowed,
    step_flops,
    train_apart,
)
from .targets import Found, Section, Target

TARGETS = {
    "train_vs_prompt_tuning": Target(4, True, "examples/s from the second epoch on, against PEFT prompt tuning"),
    "train_vs_lora": Target(3.5, True, "the same against PEFT LoRA, r=2, query and value"),
    "train_vs_padded": Target(2, True, "the same against our own path without cache and packing"),
    "first_epoch_vs_prompt_tuning": Target(1.5, True, "examples/s of the first epoch, which fills the cache"),
    "train_memory_vs_prompt_tuning": Target(0.6, False, "peak memory of training, libraries not counted"),
    "prefill_vs_bare": Target(1.1, False, "seconds to read an instruction, against the bare model"),
    "decode_vs_bare_batch_1": Target(1.05, False, "seconds per generated token, batch 1, against the bare model"),
    "decode_vs_bare_batch_8": Target(1.05, False, "the same, batch 8"),
    "mixed_batch_vs_lora": Target(1.5, True, "tokens/s of one batch of all tasks, against a LoRA for each in PEFT"),
    "matrix_peak_share": Target(0.6, True, "arithmetic of training, as a share of the machine's float32 peak"),
    "experts_70_vs_7": Target(2, False, "seconds of a training step, 70 experts against 7"),
    "gate_pretraining_seconds": Target(20, False, "seconds of gate pretraining on 4,500 examples from a filled cache"),
    "busy_neighbour": Target(2.2, False, "seconds of training beside a process that takes one core, against none"),
}


def medians(turns: dict[str, list[float]]) -> dict[str, float]:
    """Of each side."""
    return {name: median(values) for name, values in turns.items()}


# ------------------------------------------------------------------------------------------------------------ training
def _training(lab: Lab, names: Sequence[str]) -> Found:
    """One epoch of each side under HF's Trainer."""
    rival = {"train_vs_prompt_tuning": "prompt_tuning", "train_vs_lora": "lora", "train_vs_padded": "padded",
             "first_epoch_vs_prompt_tuning": "prompt_tuning"}  # fmt: skip
    sides = {name: lab.side(name) for name in dict.fromkeys(["mops", *(rival[name] for name in names)])}
    calls: dict[str, Callable[[], float]] = {
        name: lambda side=side: lab.train(side)[0] for name, side in sides.items()  # type: ignore[misc]
    }  # fmt: skip
    if "first_epoch_vs_prompt_tuning" in names:
        calls["fill"] = lambda: clocked(lambda: lab.fill(sides["mops"].model))
    turns = alternate(calls, lab.config.repeats)
    seconds = medians(turns)
    ratios: dict[str, float | None] = {
        name: seconds[rival[name]] / (seconds["mops"] + (seconds["fill"] if name.startswith("first") else 0))
        for name in names
    }
    return ratios, {
        "seconds_per_epoch": turns,
        "median_seconds": seconds,
        "examples_per_second": {name: len(lab.rows) / value for name, value in seconds.items()},
        "tokens_per_second": {name: sum(lab.lengths) / value for name, value in seconds.items()},
        "bytes_of_cache": lab.cache.nbytes,
    }


def _memory(lab: Lab, names: Sequence[str]) -> Found:
    """Each side in processes of its own; what was resident before the model was built is libraries and data."""
    sides: dict[str, list[tuple[int, int]]] = {"mops": [], "prompt_tuning": []}
    for _ in range(min(lab.config.repeats, 3)):
        for name, found in sides.items():
            if (measured := train_apart(lab.config, name)) is None:
                return dict.fromkeys(names), {}
            found.append(measured)
    taken = {name: median(peak - before for before, peak in found) for name, found in sides.items()}
    return {names[0]: taken["mops"] / taken["prompt_tuning"]}, {
        "bytes_before": {name: [before for before, _ in found] for name, found in sides.items()},
        "bytes_at_peak": {name: [peak for _, peak in found] for name, found in sides.items()},
        "bytes_taken": taken,
    }


def _peak(lab: Lab, names: Sequence[str]) -> Found:
    """Steps of training and plain matrix products, taking turns."""
    side, config = lab.side("mops"), lab.config
    flops: list[dict[str, int]] = []

    def step() -> float:
        seconds, steps = lab.train(side)
        flops[:] = [step_flops(config, [lab.lengths[i] for i in each], sum(lab.predicted[i] for i in each))
                    for each in steps]  # fmt: skip
        return seconds

    rates: dict[str, Callable[[], float]] = {
        str(size): lambda size=size: matmul_rate(size) for size in config.peak_sizes  # type: ignore[misc]
    }  # fmt: skip
    turns = alternate({"step": step} | rates, config.repeats)
    epoch, peak = median(turns.pop("step")), max(max(values) for values in turns.values())
    done = {part: sum(each[part] for each in flops) for part in flops[0]}
    share = sum(done.values()) / epoch / peak
    return {names[0]: share}, {"flops_per_epoch": done, "seconds_per_epoch": epoch, "peak_flops_per_second": peak,
                               "floor_seconds_per_epoch": share * epoch, "matmul_flops_per_second": turns,
                               "formula": step_flops.__doc__}  # fmt: skip


def _experts(lab: Lab, names: Sequence[str]) -> Found:
    """The same epoch with few experts and with many."""
    sides = {str(n): lab.side("mops", n) for n in (lab.config.experts, lab.config.many_experts)}
    turns = alternate(
        {name: lambda side=side: lab.train(side)[0] for name, side in sides.items()},  # type: ignore[misc]
        lab.config.repeats,
    )
    few, many = medians(turns).values()
    return {names[0]: many / few}, {"seconds_per_epoch": turns}


def _gate(lab: Lab, names: Sequence[str]) -> Found:
    """Gate inputs of real examples, repeated with a little noise until there are enough."""
    model, count = lab.adapted(lab.method("mops")), lab.config.gate_examples
    of = torch.arange(count)
    pooled = lab.cache.pooled[of % len(lab.cache)]
    pooled = pooled + 0.1 * pooled.std(0) * torch.randn(pooled.shape)
    standardise(model, pooled)
    expert_of = of % len(lab.cache) % lab.config.experts
    turns = alternate(
        {"seconds": lambda: clocked(lambda: pretrain_gate(model, pooled, expert_of, GatePretraining()))},
        lab.config.repeats,
    )
    return {names[0]: median(turns["seconds"])}, turns | {"examples": count}


def beside_a_neighbour(lab: Lab, names: Sequence[str]) -> Found:
    """The same epoch on quiet cores and with one of them taken, of MoPs and of LoRA."""
    sides = {name: lab.side(name) for name in ("mops", "lora")}
    turns = slowed({name: lambda side=side: lab.train(side)[0] for name, side in sides.items()},  # type: ignore[misc]
                   min(lab.config.repeats, 3))  # fmt: skip
    quiet, busy = medians(turns["quiet"]), medians(turns["busy"])
    times = {name: busy[name] / quiet[name] for name in sides}
    return {names[0]: times["mops"]}, turns | {"times_slower": times}


# ----------------------------------------------------------------------------------------------------------- inference
def _inference(lab: Lab, names: Sequence[str]) -> Found:
    """Bare model and MoPs in eval mode; more turns, since one takes a fraction of a second.

    Decoding has a third side, the bare model with a cache written in place as MoPs' is: what the method alone costs.
    """
    bare, mops, new = lab.base(), lab.adapted(lab.method("mops")).eval(), lab.config.new_tokens
    ratios: dict[str, float | None] = {}
    raw: dict[str, Any] = {}
    for name in names:
        batch = lab.instruction(8 if name.endswith("8") else 1)
        sides = {
            "bare": lambda b=batch: generate(bare, b, new),
            "bare_in_place": lambda b=batch: generate(bare, b, new, **in_place(bare)),
            "mops": lambda b=batch: generate(mops, b, new),
        }
        if name == "prefill_vs_bare":
            sides = {"bare": lambda b=batch: clocked(lambda: prefill(bare, b)),
                     "mops": lambda b=batch: clocked(lambda: prefill(mops, b))}  # fmt: skip
        turns = alternate(sides, 4 * lab.config.repeats)
        found = medians(turns)
        tokens = lab.config.prompt_tokens if name == "prefill_vs_bare" else len(batch["input_ids"])
        ratios[name] = found["mops"] / found["bare"]
        raw[name] = {"seconds": turns, "tokens_per_second": {side: tokens / value for side, value in found.items()}}
    return ratios, raw


def _mixed(lab: Lab, names: Sequence[str]) -> Found:
    """One batch, an instruction of each task: one MoPs model, or a LoRA adapter for each row."""
    batch, tokens, adapters = lab.mixed(), lab.config.new_tokens, [f"task{i}" for i in range(lab.config.experts)]
    bare, mops, lora = lab.base(), lab.adapted(lab.method("mops")).eval(), lab.loras(adapters).eval()

    def whole(model: Any, **options: Any) -> float:
        return clocked(lambda: generate(model, batch, tokens, **options))

    turns = alternate(
        {"bare": lambda: whole(bare), "bare_in_place": lambda: whole(bare, **in_place(bare)),
         "mops": lambda: whole(mops), "lora": lambda: whole(lora, adapter_names=adapters),
         "lora_in_place": lambda: whole(lora, adapter_names=adapters, **in_place(bare))},
        lab.config.repeats,
    )  # fmt: skip
    rates = {name: len(adapters) * tokens / value for name, value in medians(turns).items()}
    lengths = batch["attention_mask"].sum(-1).tolist()
    found = {"seconds": turns, "tokens_per_second": rates, "instruction_tokens": lengths}
    return {names[0]: rates["mops"] / rates["lora"]}, found


_NAMES = tuple(TARGETS)
SECTIONS = (
    Section("training", _NAMES[:4], _training),
    Section("memory", _NAMES[4:5], _memory),
    Section("inference", _NAMES[5:8], _inference),
    Section("mixed_batch", _NAMES[8:9], _mixed),
    Section("matrix_peak", _NAMES[9:10], _peak),
    Section("experts", _NAMES[10:11], _experts),
    Section("gate_pretraining", _NAMES[11:12], _gate),
    Section("busy_neighbour", _NAMES[12:], beside_a_neighbour),
)


# -------------------------------------------------------------------------------------------------------------- growth
def growth(lab: Lab) -> dict[str, Any]:
    """Over sequence length, experts and size of the data."""
    return {"length": _length_growth(lab), "experts": _experts_growth(lab), "data": _data_growth(lab)}


def _step(model: Any, batch: dict[str, torch.Tensor]) -> None:
    model(packed=batch).loss.backward()
    model.zero_grad()


def _steps(lab: Lab, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The first step shows the memory, later ones the time."""
    model.train()
    taken = rise(lambda: _step(model, batch))
    turns = alternate({"step": lambda: clocked(lambda: _step(model, batch))}, min(lab.config.repeats, 3))
    return {"seconds": median(turns["step"]), "peak_bytes": None if taken is None else taken[1] - taken[0]}


def _need(points: Sequence[dict[str, Any]], what: str, value: int) -> int:
    """Bytes to expect at `value`, were memory to grow in proportion to it; 0 where nothing is known."""
    seen = [point for point in points if point.get("peak_bytes")]
    return round(1.2 * seen[-1]["peak_bytes"] * value / seen[-1][what]) if seen else 0


def _room() -> int:
    return round(0.8 * (free_memory() or 2**62))


def _experts_growth(lab: Lab) -> list[dict[str, Any]]:
    """Fewer prompts per expert where the memory would not do."""
    points: list[dict[str, Any]] = []
    batch = lab.cache.batch(range(lab.config.batch_size))
    for experts in lab.config.growth_experts:
        per = lab.config.prompts_per_expert
        while per > 1 and _need(points, "prompts", experts * per) > _room():
            per //= 2
        model = lab.adapted(lab.method("mops", experts, per))
        points.append({"experts": experts, "prompts_per_expert": per, "prompts": experts * per}
                      | _steps(lab, model, batch))  # fmt: skip
        console.print(f"growth, {experts} experts of {per} prompts: {points[-1]['seconds']:.3g} s a step")
    return points


def _length_growth(lab: Lab) -> list[dict[str, Any]]:
    """Rows of one length, made up; a quarter of it is predicted. What the memory would not hold is left out."""
    points: list[dict[str, Any]] = []
    model, size = lab.adapted(lab.method("mops")), lab.config.batch_size
    for length in lab.config.growth_lengths:
        need, room = _need(points, "length", length), _room()
        if need > room or length > POSITIONS:
            reason = f"about {decimal(need)} of memory, but {decimal(room)} are free"
            points.append({"length": length, "left_out": reason})
            continue
        labels = torch.randint(lab.config.vocabulary, (size, length))
        labels[:, : length - length // 4] = IGNORED
        batch = {"hidden": torch.randn(size * length, lab.config.hidden), "labels": labels.flatten(),
                 "lengths": torch.full((size,), length), "pooled": torch.randn(size, lab.config.hidden)}  # fmt: skip
        points.append({"length": length} | _steps(lab, model, batch))
        console.print(f"growth, {size} rows of {length} tokens: {points[-1]['seconds']:.3g} s a step")
    return points


def _data_growth(lab: Lab) -> list[dict[str, Any]]:
    """Filling a cache on disk with short made-up rows, and fetching random batches from it."""
    points: list[dict[str, Any]] = []
    model, size, n = lab.adapted(lab.method("mops")), lab.config.batch_size, lab.config.growth_tokens
    for count in lab.config.growth_examples:
        ids = torch.randint(3, min(3072, lab.config.vocabulary), (count, n)).tolist()
        rows = [Encoded(each, [IGNORED] * (n // 2) + each[n // 2 :]) for each in ids]
        draw = random.Random(0)
        with tempfile.TemporaryDirectory(dir=lab.config.out, prefix="growth-") as folder:
            started = time.perf_counter()
            cache = ActivationCache.fill(model, rows, Path(folder), progress=False)
            filled = time.perf_counter() - started
            fetch = [clocked(lambda: cache.batch(draw.sample(range(count), size))) for _ in range(100)]  # noqa: B023
        points.append({"examples": count, "fill_seconds": filled, "batch_seconds": median(fetch),
                       "bytes": cache.nbytes})  # fmt: skip
        console.print(f"growth, {count} examples: filled in {filled:.3g} s, a batch in {median(fetch):.3g} s")
    return points
