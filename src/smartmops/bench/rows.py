"""The rows of `smartmops bench MODEL`, each with its targets: training, memory, inference, preparing.

Every section takes the laboratory and the ratios wanted of it, and returns those with the numbers they are made of.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from smartmops.evaluation.perplexity import evaluate
from smartmops.fitting.kept import put_state, state_of
from smartmops.fitting.loop import fit
from smartmops.options.training import Schedule
from smartmops.states.answer_states import AnswerStates
from smartmops.tokens.batches import prompts
from smartmops.tuner.engine import Engine

from .base import BaseLab
from .ratios import beside_a_neighbour, medians
from .sides import Lab, Side, alternate, clocked, generate, train_apart
from .targets import Found, Section, Target

RIVALS = ("lora", "prompt_tuning", "prefix_tuning")
FEW_ANSWERS = 0.2  # of all tokens: where answers are fewer, training from states has more to gain
SHARES = (0.5, 1, 2, 4, 8)  # of LoRA's steps, that the experts are given to reach its loss, until they do
LORA, AT_BEST = "against PEFT LoRA, r=2, query and value", "examples/s once states are there"
TARGETS = {
    "train_vs_lora": Target(3, True, f"{AT_BEST}, {LORA} (8 where answers are under a fifth of the tokens)"),
    "train_vs_prompt_tuning": Target(None, True, f"{AT_BEST}, against PEFT prompt tuning"),
    "train_vs_prefix_tuning": Target(None, True, f"{AT_BEST}, against PEFT prefix tuning"),
    **{f"train_{name}_vs_{rival}": Target(None, True, f"the same, {name} rows, against PEFT {rival.replace('_', ' ')}")
       for name in ("short", "middle", "long") for rival in RIVALS},
    "memory_vs_lora": Target(0.5, False, "memory taken by base, adapter, states and training, against PEFT LoRA's"),
    "epochs_until_preparing_paid": Target(None, False, "epochs until preparing and states have paid, against LoRA"),
    "preparing_seconds": Target(None, False, "seconds of gate, null expert and experts from the training rows"),
    "states_seconds": Target(None, False, "seconds of the states of all training rows"),
    "states_bytes_per_example": Target(None, False, "bytes of states of one example, in memory"),
    "quality_vs_lora": Target(1, True, "seconds of LoRA, over those of the shortest run of MoPs to its loss"),
    "quality_prepared_vs_lora": Target(None, True, "the same, preparing and states counted"),
    "prefill_vs_bare": Target(1.1, False, "seconds to read an instruction, against the bare model"),
    "gate_read_share": Target(0.02, False, "seconds of reading the gate, as a share of prefill"),
    "decode_vs_bare_batch_1": Target(1.05, False, "seconds per generated token, batch 1, against the bare model"),
    "decode_vs_bare_batch_16": Target(1.05, False, "the same, batch 16"),
    "mixed_vs_one_task": Target(0.95, True, "tokens/s of 16 rows, an expert each in turn, against one expert for all"),
    "start_up_seconds": Target(None, False, "seconds from nothing to an opened base, in a process of its own"),
    "busy_neighbour": Target(2.2, False, "seconds of training beside a process that takes one core, against none"),
}  # fmt: skip


def target_of(name: str, share: float) -> Target:
    """The target of a ratio on data whose answers are such a share of all tokens."""
    target = TARGETS[name]
    return target._replace(value=8) if name == "train_vs_lora" and share < FEW_ANSWERS else target


# ------------------------------------------------------------------------------------------------------------ training
def _training(lab: Lab, names: Sequence[str], group: str | None = None) -> Found:
    """One epoch of each side under HF's Trainer, the same batches in the same order."""
    assert isinstance(lab, BaseLab)
    chosen = lab.group(group) if group else lab
    sides = {name: chosen.side(name) for name in ("mops", *RIVALS)}
    filled = clocked(partial(sides["mops"].collate, range(len(chosen.rows))))
    turns = alternate({name: partial(_epoch, chosen, side) for name, side in sides.items()}, lab.config.repeats)
    seconds = medians(turns)
    ratios: dict[str, float | None] = {
        name: next(seconds[rival] for rival in RIVALS if name.endswith(rival)) / seconds["mops"] for name in names
    }
    return ratios, {
        "seconds_per_epoch": turns, "median_seconds": seconds, "states_seconds": filled,
        "states_bytes": _held(sides["mops"].collate), "examples": len(chosen.rows), "tokens": sum(chosen.lengths),
        "predicted_tokens": sum(chosen.predicted), "longest": max(chosen.lengths),
        "examples_per_second": {name: len(chosen.rows) / value for name, value in seconds.items()},
    }  # fmt: skip


def _epoch(lab: Lab, side: Side) -> float:
    return lab.train(side)[0]


def _held(states: Any) -> int:
    return int(states.kept) if isinstance(states, AnswerStates) else 0


def _memory(lab: Lab, names: Sequence[str]) -> Found:
    """Each side in processes of its own, which have loaded libraries, data and base before."""
    taken: dict[str, list[int]] = {"mops": [], "lora": []}
    weights = sum(p.numel() * p.element_size() for p in lab.base().parameters())
    for _ in range(min(lab.config.repeats, 2)):
        for name, found in taken.items():
            if (measured := train_apart(lab.config, name)) is None:
                return dict.fromkeys(names), {}
            found.append(measured[1] - measured[0] + weights)
    middle = {name: median(found) for name, found in taken.items()}
    return {names[0]: middle["mops"] / middle["lora"]}, {"bytes_taken": taken, "bytes_of_base": weights}


def _preparing(lab: Lab, names: Sequence[str]) -> Found:
    """What is paid before the first step, and after how many epochs over the same rows it is earned against LoRA."""
    assert isinstance(lab, BaseLab)
    model, prepared = lab.prepared()
    states = AnswerStates(model, lab.rows)
    filled = clocked(partial(states.batch, range(len(lab.rows))))
    sides = {"mops": Side(model, lab.settings, states), "lora": lab.side("lora")}
    turns = alternate({name: partial(_epoch, lab, side) for name, side in sides.items()}, 1)
    gained = turns["lora"][0] - turns["mops"][0]
    found = {
        "preparing_seconds": prepared, "states_seconds": filled, "states_bytes_per_example": states.kept / len(states),
        "epochs_until_preparing_paid": float(math.ceil((prepared + filled) / gained)) if gained > 0 else None,
    }  # fmt: skip
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    return {name: found[name] for name in names}, {
        "examples": len(lab.rows), "seconds_per_epoch": turns, "bytes_of_adapter": size, "bytes_of_states": states.kept,
    }  # fmt: skip


def _quality(lab: Lab, names: Sequence[str]) -> Found:
    """Seconds of LoRA's steps, and of the shortest run of the experts that ends at its validation loss or below.

    Each run has the schedule of `train`, whose learning rate falls to zero with its own number of steps, and starts
    from the same prepared experts: a loss in the middle of a longer schedule would not be what so many steps can give.
    """
    assert isinstance(lab, BaseLab)
    held, lora, (model, prepared) = lab.held_out(), lab.settled("lora"), lab.prepared()
    side, states = Side(model, lab.settings, AnswerStates(model, lab.rows)), AnswerStates(model, held)
    filled = clocked(partial(side.collate, range(len(lab.rows))))
    before = _nats(lora.model, held, lab.collator)
    slow = _trained(lab, lora, lab.config.quality_steps)
    wanted, start, runs = _nats(lora.model, held, lab.collator), state_of(model), []
    for share in SHARES:
        put_state(model, start)
        steps = max(1, round(share * lab.config.quality_steps))
        seconds = _trained(lab, side, steps)
        runs.append({"steps": steps, "seconds": seconds, "validation_nats": _nats(model, held, lab.collator, states)})
        if reached := runs[-1]["validation_nats"] <= wanted:
            break
    quick = runs[-1]["seconds"]
    ratios: dict[str, float | None] = {
        "quality_vs_lora": slow / quick if reached else None,
        "quality_prepared_vs_lora": slow / (quick + prepared + filled) if reached else None,
    }
    return {name: ratios[name] for name in names}, {
        "lora_steps": lab.config.quality_steps, "lora_seconds": slow, "validation_nats_before": before,
        "lora_validation_nats": wanted, "mops": runs, "preparing_seconds": prepared, "states_seconds": filled,
        "validation_examples": len(held),
    }  # fmt: skip


def _nats(model: Any, rows: Any, collator: Any, states: Any = None) -> float:
    return math.log(evaluate(model, rows, collator, cache=states).overall)


def _trained(lab: Lab, side: Side, steps: int) -> float:
    """Seconds of so many steps by the schedule of `train`."""
    schedule = Schedule(steps=steps, batch_size=lab.config.batch_size, save_every=10**9)
    side.model.train()
    return clocked(partial(fit, side.model, side.method, schedule, range(len(lab.rows)), side.collate,
                           lab.config.out / "checkpoints"))  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- inference
def _asked(lab: BaseLab, count: int) -> dict[str, Tensor]:
    """Prompts of so many rows of middle length, padded on the left."""
    ordered = sorted(range(len(lab.task.train)), key=lambda i: len(lab.task.train[i].input_ids))
    start = max(0, len(ordered) // 2 - count // 2)
    chosen = [lab.task.train_examples[i] for i in ordered[start : start + count]]
    batch = prompts(chosen, lab.tokenizer, lab.config.max_length, lab.task.template)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _prefill(lab: Lab, names: Sequence[str]) -> Found:
    """Reading one instruction; and what of it is spent on the gate, in the same passes."""
    assert isinstance(lab, BaseLab)
    bare, mops, batch = lab.base(), lab.adapted(lab.method("mops")).eval(), _asked(lab, 1)
    spent = _on_the_gate(mops)
    turns = alternate({"bare": lambda: clocked(lambda: _first_token(bare, batch)),
                       "mops": lambda: clocked(lambda: _first_token(mops, batch))}, 4 * lab.config.repeats)  # fmt: skip
    found, gate = medians(turns), median(spent[1:])
    ratios: dict[str, float | None] = {
        "prefill_vs_bare": found["mops"] / found["bare"], "gate_read_share": gate / found["mops"],
    }  # fmt: skip
    return {name: ratios[name] for name in names}, {"seconds": turns, "gate_seconds": spent, "tokens": _shape(batch)}


def _first_token(model: Any, batch: dict[str, Tensor]) -> None:
    model.generate(**batch, min_new_tokens=1, max_new_tokens=1, do_sample=False, pad_token_id=0)


def _on_the_gate(mops: Any) -> list[float]:
    """Seconds of each reading of the gate from now on: a pass of its own, where it needs one, and its arithmetic."""
    engine: Any = Engine.on(mops.base_model.model)
    wrapper = mops.base_model.layer()
    ahead, read, spent, before = engine._read_ahead, wrapper.read, list[float](), [0.0]

    def reading_ahead(*args: Any) -> Any:
        started = time.perf_counter()
        found = ahead(*args)
        before[0] = time.perf_counter() - started
        return found

    def reading(*args: Any) -> None:
        spent.append(clocked(lambda: read(*args)) + before[0])
        before[0] = 0.0

    engine._read_ahead, wrapper.read = reading_ahead, reading
    return spent


def _decoding(lab: Lab, names: Sequence[str]) -> Found:
    """Seconds between two tokens of greedy generation."""
    assert isinstance(lab, BaseLab)
    bare, mops, new = lab.base(), lab.adapted(lab.method("mops")).eval(), lab.config.new_tokens
    batch = _asked(lab, int(names[0].rsplit("_", 1)[1]))
    turns = alternate({"bare": lambda: generate(bare, batch, new), "mops": lambda: generate(mops, batch, new)},
                      2 * lab.config.repeats)  # fmt: skip
    found = medians(turns)
    rates = {side: len(batch["input_ids"]) / value for side, value in found.items()}
    return {names[0]: found["mops"] / found["bare"]}, {"seconds": turns, "tokens_per_second": rates,
                                                       "tokens": _shape(batch)}  # fmt: skip


def _mixed(lab: Lab, names: Sequence[str]) -> Found:
    """The same 16 prompts, their gates given: each row an expert in turn, or all rows the first one."""
    assert isinstance(lab, BaseLab)
    mops, batch, experts = lab.adapted(lab.method("mops")).eval(), _asked(lab, 16), lab.config.experts
    count, new = len(batch["input_ids"]), lab.config.new_tokens
    chosen = {"one": torch.zeros(count, dtype=torch.long), "mixed": torch.arange(count) % experts}
    gates = {name: torch.nn.functional.one_hot(each, experts).float() for name, each in chosen.items()}
    turns = alternate({name: partial(_whole, mops, batch, new, gate) for name, gate in gates.items()},
                      2 * lab.config.repeats)  # fmt: skip
    found = medians(turns)
    return {names[0]: found["one"] / found["mixed"]}, {"seconds": turns, "rows": count, "new_tokens": new,
                                                       "tokens": _shape(batch)}  # fmt: skip


def _whole(mops: Any, batch: dict[str, Tensor], new: int, gate: Tensor) -> float:
    return clocked(lambda: generate(mops, batch, new, gate_weights=gate))


def _shape(batch: dict[str, Tensor]) -> list[int]:
    return list(batch["input_ids"].shape)


def _start_up(lab: Lab, names: Sequence[str]) -> Found:
    """A process that imports the library and opens the base; here the base is in the system's file cache already."""
    code = "import sys; from smartmops.base import load_base; load_base(sys.argv[1], sys.argv[2])"
    call = [sys.executable, "-c", code, str(lab.config.model), lab.config.dtype]
    run = partial(subprocess.run, call, capture_output=True, check=True)
    seconds = [clocked(run) for _ in range(lab.config.repeats)]
    return {names[0]: median(seconds)}, {"seconds": seconds}


def _named(prefix: str) -> tuple[str, ...]:
    return tuple(f"{prefix}_vs_{rival}" for rival in RIVALS)


SECTIONS = (
    Section("train", _named("train"), _training),
    *(Section(f"train_{name}", _named(f"train_{name}"), partial(_training, group=name))
      for name in ("short", "middle", "long")),
    Section("memory", ("memory_vs_lora",), _memory),
    Section("preparing", ("epochs_until_preparing_paid", "preparing_seconds", "states_seconds",
                          "states_bytes_per_example"), _preparing),
    Section("quality", ("quality_vs_lora", "quality_prepared_vs_lora"), _quality),
    Section("prefill", ("prefill_vs_bare", "gate_read_share"), _prefill),
    Section("decode_1", ("decode_vs_bare_batch_1",), _decoding),
    Section("decode_16", ("decode_vs_bare_batch_16",), _decoding),
    Section("mixed", ("mixed_vs_one_task",), _mixed),
    Section("start_up", ("start_up_seconds",), _start_up),
    Section("busy_neighbour", ("busy_neighbour",), beside_a_neighbour),
)  # fmt: skip
