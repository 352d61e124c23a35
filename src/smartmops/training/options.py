"""Options that cannot work, refused before anything is read or loaded, by the names they have on the command line.

Knows names and limits; reads nothing but, where it lies on this machine, the base's `config.json`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoConfig

from .baselines import OURS
from .gating import unrelated_texts

AT_LEAST = {
    "batch_size": 1, "steps": 0, "warmup_steps": 0, "log_every": 1, "save_every": 1, "eval_every": 1, "patience": 1,
    "max_length": 1, "limit": 1, "validation_limit": 1, "experts": 1, "prompts_per_expert": 1, "gate_hidden_size": 1,
    "gate_top_k": 1, "injection_layer": 0, "lora_rank": 1, "lora_from": 0, "gate_pretraining_steps": 0,
    "recovery_prompts": 0, "recovery_steps": 0, "samples_per_task": 0, "answers_per_task": 0, "answer_tokens": 1,
    "interference_examples": 0, "shots": 0, "shared_prompts": 0, "gate_layer": 0,
}  # fmt: skip
RATES = ("prompt_lr", "gate_lr", "recovery_lr", "gate_pretraining_lr", "relative_lr")
ABOVE_ZERO = ("clip", "max_grad_norm", "gate_temperature")
WORDS = {"activations": ("auto", "memory", "off"), "rows": ("memory",)}


def typed(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"


def check(config: Any) -> None:
    """What can be known of the options of `train` or `compare` by themselves.

    Raises:
        ValueError: one is outside its limits; the message names value, limit and way out.
    """
    for name, value in _given(config, AT_LEAST):
        if value < AT_LEAST[name]:
            raise ValueError(f"{typed(name)} {value}: choose {AT_LEAST[name]} or more")
    for name, value in [*_given(config, RATES), *getattr(config, "methods", {}).items()]:
        if value is not None and not 0 <= value < math.inf:
            option = typed(name) if name in RATES else f"--methods {name}"
            raise ValueError(f"{option} {value}: choose a finite rate of 0 or more")
    for name, value in _given(config, ABOVE_ZERO):
        if not 0 < value < math.inf:
            raise ValueError(f"{typed(name)} {value}: choose a finite number above 0")
    _check_shares(config)
    _check_experts(config)
    for name, words in WORDS.items():
        _check_folder(name, getattr(config, name), words)


def _given(config: Any, names: Any) -> list[tuple[str, Any]]:
    """Those of the options that this config has, and that are set."""
    return [(name, value) for name in names if (value := getattr(config, name, None)) is not None]


def _check_shares(config: Any) -> None:
    if not 0 <= config.warmup < 1:
        raise ValueError(f"--warmup {config.warmup}: choose a share of the steps from 0 to below 1, such as 0.06, or "
                         "give --warmup-steps")  # fmt: skip
    if not 0 < config.test_share < 1:
        raise ValueError(f"--test-share {config.test_share}: choose a share between 0 and 1, such as 0.1")
    if not 0 <= config.validation_share <= 0.5:
        raise ValueError(f"--validation-share {config.validation_share}: choose a share from 0 (none) to 0.5, such as "
                         "0.1")  # fmt: skip
    if config.patience is not None and not config.validation_share:
        raise ValueError(f"--patience {config.patience} waits for evaluations on validation data, and there are none "
                         "with --validation-share 0: choose a share above 0, or leave --patience away")  # fmt: skip


def _check_experts(config: Any) -> None:
    """Options of our own methods, where the method or the kind of expert has no use for them."""
    methods = list(getattr(config, "methods", None) or [config.method])
    wanted = {
        "visible_to": config.visible_to, "null_expert": config.null_expert, "unrelated": config.unrelated,
        "shared_prompts": config.shared_prompts, "gate_layer": config.gate_layer,
        "prefix_attention": None if config.prefix_attention == "joint" else config.prefix_attention,
    }  # fmt: skip
    for name, value in wanted.items():
        if value in (None, 0, False):
            continue
        if not any(method in OURS for method in methods):
            raise ValueError(f"{typed(name)} {value} is of experts, and --method {methods[0]} has none: choose "
                             "--method mops, or leave it away")  # fmt: skip
        needs = value == "answers" or name == "prefix_attention"
        if needs and config.expert_kind == "hidden_states":
            raise ValueError(f"{typed(name)} {value} needs --expert-kind keys_values, but it is hidden_states: choose "
                             f"that, or leave {typed(name)} away")  # fmt: skip
    if config.answers_alone and getattr(config, "recovery_prompts", None) and any(m in OURS for m in methods):
        raise ValueError(f"--recovery-prompts {config.recovery_prompts} are seen by every token, and instructions are "
                         "left to the bare base: choose 0 of them, or --visible-to all")  # fmt: skip
    if not math.isfinite(config.null_threshold):
        raise ValueError(f"--null-threshold {config.null_threshold}: choose a weight from 0 (all is left to the base) "
                         "to 1, or more than 1 (nothing is)")  # fmt: skip
    if config.unrelated is not None:
        unrelated_texts(config.unrelated)


def _check_folder(name: str, value: str, words: Sequence[str]) -> None:
    """A folder must look like one, so that a typing error in a word does not become one."""
    path = Path(value)
    separators = [s for s in (os.sep, os.altsep) if s]
    if value in words or path.is_dir():
        return
    if path.exists():
        raise ValueError(f"{typed(name)} {value} is a file: choose a folder")
    if not any(s in value for s in separators):
        raise ValueError(f"{typed(name)} {value}: choose {', '.join(words)}, or a folder such as .{os.sep}{value}")


def check_split(config: Any, train: int, test: int, world: int) -> None:
    """What can be known once the data are read.

    Args:
        config: A `TaskConfig`.
        train: Training examples, those for validation among them.
        test: Test examples.
        world: Processes that train together.

    Raises:
        ValueError: a batch is larger than the training split, or there is nothing to train on or to test on.
    """
    if not train or not test:
        raise ValueError(f"--data {config.data}: {train} training and {test} test examples. Every category is split by "
                         "itself, and one with a single example has none to test on: give two or more")  # fmt: skip
    if config.batch_size * world > train:
        who = f" in each of {world} processes" if world > 1 else ""
        raise ValueError(f"--batch-size {config.batch_size}{who}, but there are {train} training examples: choose 1 to "
                         f"{max(1, train // world)}")  # fmt: skip


def check_hold_out(category: str, found: set[str]) -> None:
    """Whether a category to train nothing on is one of those `found` in the training split, and not the only one.

    Raises:
        ValueError: it is not.
    """
    if category not in found:
        raise ValueError(f"hold_out={category!r} is no category of the training split: choose one of {sorted(found)}")
    if len(found) == 1:
        raise ValueError(f"hold_out={category!r} is the only category of the training split, so nothing is left to "
                         "train on: give data of several tasks, or leave hold_out away")  # fmt: skip


def check_base(method: Any, name: str) -> None:
    """Whether the method's settings fit a base whose `config.json` lies in the folder `name`; nothing where none does.

    Raises:
        ValueError: a setting is outside its limits.
    """
    if method.method not in OURS or not (Path(name) / "config.json").is_file():
        return
    shape = AutoConfig.from_pretrained(name).get_text_config()
    layers, width = (getattr(shape, key, None) for key in ("num_hidden_layers", "hidden_size"))
    if layers and width:
        method.peft(getattr(method, "recovery_prompts", None) or 0).resolve(layers, width)


def warn_of_calibration(config: Any, folder: str, console: Console) -> None:
    """Say so where the base was compressed on examples that are about to be tested on."""
    record = Path(folder) / "compression.json"
    text = json.loads(record.read_text())["calibration"] if record.is_file() else None
    if not text or not text["sequences"] or text["data"] != config.data:
        return
    split = {"seed": config.data_seed, "limit": config.limit, "test_share": config.test_share}
    if text["split"] != split:
        console.print(
            f"{config.model} was calibrated on another split of {config.data} ({text['split']}, here {split}), so on "
            "examples of this test split: compress again with --data-seed, --limit and --test-share as here"
        )
