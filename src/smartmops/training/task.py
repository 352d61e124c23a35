"""A frozen base beside its data: what every method, seed and client compared in one sitting shares.

Knows how base, examples, cache and a fresh adapter belong together. Knows no loop and writes no files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from jaxtyping import Float
from peft import PeftModel
from rich.console import Console
from torch import Tensor
from transformers import set_seed

from smartmops.base import load_base, local
from smartmops.data.batches import Collator, Encoded, encode_all, packed
from smartmops.data.example import Example
from smartmops.data.stored import take
from smartmops.data.tasks import splits
from smartmops.data.template import Template, check_template
from smartmops.tuner import MoPsModel
from smartmops.tuner.gate import by_expert

from . import ranks
from .activations import ActivationCache, free_memory
from .baselines import OURS, MethodConfig, build
from .evaluate import Evaluation, evaluate
from .options import check_base, check_split
from .pretrain import (
    Embedder,
    GatePretraining,
    assign,
    initialise,
    instructions,
    pretrain_gate,
    standardise,
    train_recovery,
)
from .selection import TOLD, level, told, wire
from .validation import ValidationConfig, hold_out

console = Console()


@dataclass(kw_only=True)
class TaskConfig(MethodConfig, GatePretraining):
    """What is adapted to which data, and how both are read."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]  # a local folder, a hub id, or tiny
    data: str
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the frozen base; auto: bfloat16 where it is faster
    template: str = "auto"  # chat: the tokenizer's own; plain: a frame; or a Jinja file. auto: chat if there is one
    max_length: int = 512  # tokens; longer examples lose the end of their context
    limit: int | None = None  # use only so many examples, drawn at random (the paper: 5000)
    test_share: float = 0.1  # of each category
    batch_size: int = 16  # examples; of each process where a launcher started several
    seed: int = 0  # of experts, gate and order
    data_seed: int = 0  # of the draw and the split, so that runs of different seeds are tested on the same examples
    validation: bool = False  # hold out a part of the training split instead of the test split: to choose settings by
    hold_out: str | None = None  # a category to train nothing on, tested all the same: what an unseen task gains
    recovery_prompts: int = 10  # frozen prompts at the input, trained first; best in the ablation (docs/evidence.md)
    recovery_steps: int = 20  # optimiser steps
    recovery_lr: float = 0.03
    activations: str = (
        "auto"  # what the lower half makes of the data: kept in memory if it fits; memory, off or a folder
    )
    rows: str = "memory"  # texts and tokens of the data: kept in memory, or written to a folder and mapped from there

    @property
    def folder(self) -> Path | None:
        """That texts and tokens are mapped from."""
        return None if self.rows == "memory" else Path(self.rows)


@dataclass
class Task:
    """A frozen base with the data it is to be adapted to: what every method compared in one sitting shares."""

    base: Any
    tokenizer: Any
    train: Sequence[Encoded]
    test: Sequence[Encoded]
    train_examples: Sequence[Example]
    test_examples: Sequence[Example]
    collator: Collator
    template: Template  # that texts are rendered with
    recovery: torch.Tensor | None = None
    embedder: Embedder | None = None
    activations: str = "auto"
    validation: Sequence[Encoded] = ()  # of the training split, not trained on
    caches: dict[Any, ActivationCache | None] = field(default_factory=dict)

    @classmethod
    def load(cls, config: TaskConfig, base: Any = None, tokenizer: Any = None) -> Task:
        """Read, split and encode the data, load the base unless given, train recovery prompts; says what was cut.

        A base that is adapted already brings its own recovery prompts, or none.

        Raises:
            ValueError: `hold_out` is no category of the training split, or the only one; the data do not fit.
        """
        train, test = splits(config.data, config.limit, config.test_share, config.data_seed, config.validation,
                             config.folder)  # fmt: skip
        if config.hold_out is not None:
            _check_hold_out(config.hold_out, train)
        _warn_of_calibration(config)
        check_template(config.template)
        if base is None:
            check_base(config, local(config.model))
            check_split(config, len(train), len(test), ranks.world())
            base, tokenizer = load_base(config.model, config.dtype)
        task = cls.of(base, tokenizer, train, test, config)
        if config.recovery_prompts and config.method in OURS and not isinstance(base, PeftModel):
            size = config.batch_size * ranks.world()
            task.recovery = train_recovery(base, task.train, task.collator, config.recovery_prompts,
                                           config.recovery_steps, config.recovery_lr, size, config.seed)  # fmt: skip
        return task

    @classmethod
    def of(
        cls, base: Any, tokenizer: Any, train: Sequence[Example], test: Sequence[Example], config: TaskConfig
    ) -> Task:
        """Encode examples for a base; either part may be empty. What does not fit is left out, and said.

        Examples of the category `hold_out` are left out of the training part only.
        """
        if config.hold_out is not None:
            train = take(train, (i for i, example in enumerate(train) if example.category != config.hold_out))
        held: Sequence[Example] = []
        if isinstance(config, ValidationConfig):
            train, held = hold_out(train, config, config.data_seed)
        limit = min(config.max_length, getattr(base.config, "max_position_embeddings", config.max_length))
        template = Template.of(config.template, tokenizer)
        collator = Collator(tokenizer)
        embedder = Embedder(config.embedder) if config.embedder else None
        rows: list[Sequence[Encoded]] = []
        kept: list[Sequence[Example]] = []
        for name, part in (("train", train), ("test", test), ("validation", held)):
            if not part:
                rows.append([])
                kept.append([])
                continue
            encoding = encode_all(part, tokenizer, limit, embedder, config.folder, template)
            console.print(f"{name}: {len(encoding.rows)} examples; {encoding.truncation}")
            kept.append(take(part, encoding.kept))
            rows.append(encoding.rows)
        return cls(base, tokenizer, rows[0], rows[1], kept[0], kept[1], collator, template, None, embedder,
                   config.activations, rows[2])  # fmt: skip

    def adapt(self, method: MethodConfig, gate: GatePretraining, seed: int) -> tuple[Any, list[str], float | None]:
        """A fresh adapter, experts initialised and gate pretrained; also expert names and the gate's accuracy."""
        set_seed(seed)
        width = self.embedder.width if self.embedder and method.method in ("mops", "uniform-gate", "top-1") else None
        model = build(self.base, method, self.recovery, method.experts if method.method in TOLD else width)
        if method.method not in OURS:
            return model, [], None
        names, expert_of, accuracy = ["all"], [0] * len(self.train), None
        if model.base_model.layer().configs["default"].num_experts > 1:
            expert_of, names, accuracy = self._gate(model, method, gate, seed)
        if method.init == "hidden_states":
            initialise(model, self.train, self.collator, expert_of, seed)
        return model, names, accuracy

    def _gate(
        self, model: Any, method: MethodConfig, gate: GatePretraining, seed: int
    ) -> tuple[list[int], list[str], float | None]:
        """Make the gate what the method wants; the expert each example is meant for, their names, the accuracy."""
        config, accuracy = model.base_model.layer().configs["default"], None
        cache = self.cache(model)
        pooled = instructions(model, self.train) if cache is None else cache.pooled.to(model.device)
        if method.method in TOLD:
            wire(model)
            expert_of, names = pooled.argmax(-1).tolist(), [f"cluster {i}" for i in range(config.num_experts)]
            if method.method == "oracle":
                _, names = assign(self.train, pooled, config.num_experts, "labels", seed)
        else:
            standardise(model, pooled)
            how = gate.gate_pretraining if gate.gate_pretraining != "none" else "clusters"
            expert_of, names = assign(self.train, pooled, config.num_experts, how, seed, gate.expert_names)
            if method.method == "uniform-gate":
                level(model)
            elif gate.gate_pretraining != "none" and method.method != "top-1":
                accuracy = pretrain_gate(model, pooled, torch.tensor(expert_of), gate)
        config.expert_names = names
        return expert_of, names, accuracy

    def told(self, method: MethodConfig, seed: int) -> Task:
        """This task, or where the method's gate is told what to choose, one whose rows say it.

        Raises:
            ValueError: more tasks than experts, or a test task that training never saw.
        """
        if method.method not in TOLD:
            return self
        train, rest = told(self.base, self.train, [*self.test, *self.validation], method, seed)
        count = len(self.test)
        return replace(self, train=train, test=rest[:count], validation=rest[count:], caches={})

    def cache(self, model: Any, rows: Sequence[Encoded] | None = None) -> ActivationCache | None:
        """The lower half's results on the training split, computed once for all methods and seeds that share it.

        Or on other rows of this task, such as the test split. None where it is off or does not fit the memory.
        """
        rows = self.train if rows is None else rows
        config = model.base_model.layer().configs["default"]
        key = (config.injection_layer, config.num_recovery_prompts, config.gate_input, config.embedding_size, id(rows))
        if key not in self.caches:
            self.caches[key] = self._fill(model, rows)
        return self.caches[key]

    def _fill(self, model: Any, rows: Sequence[Encoded]) -> ActivationCache | None:
        if self.activations == "off":
            return None
        if self.activations == "auto":
            need, free = ranks.on_this_machine() * ActivationCache.size(model, rows), free_memory()
            if free is not None and need > free / 4:
                console.print(
                    f"activations would take {need / 2**30:.1f} GiB, over a quarter of the {free / 2**30:.1f} GiB of "
                    "free memory, so the lower half runs in every step; --activations DIR keeps them on disk"
                )
                return None
        folder = None if self.activations in ("auto", "memory") else Path(self.activations)
        return ActivationCache.fill(model, rows, folder)

    def evaluate(self, model: Any, progress: bool = False, rows: Sequence[Encoded] | None = None) -> Evaluation:
        """Perplexity on the test split, or on `rows`; a MoPs model runs its upper half only, from the second time on.

        `rows` must outlive this task's caches, which know them by their identity.
        """
        rows = self.test if rows is None else rows
        cache = self.cache(model, rows) if isinstance(model.base_model, MoPsModel) else None
        return evaluate(model, rows, self.collator, progress=progress, cache=cache)

    def feed(self, model: Any) -> tuple[Sequence[Any], Callable[[Sequence[Any]], dict[str, Any]]]:
        """A data set and its collator for `fit`: MoPs train on examples end to end, from the injection layer up."""
        if not isinstance(model.base_model, MoPsModel):
            return self.train, self.collator
        cache = self.cache(model)
        return (self.train, packed) if cache is None else (range(len(cache)), cache)

    def weights(self, model: Any) -> Float[Tensor, "test experts"]:
        """Gate weight of each expert for each test instruction."""
        model.eval()
        layer = model.base_model.layer()
        config = layer.configs["default"]
        cache = self.cache(model, self.test)
        pooled = instructions(model, self.test) if cache is None else cache.pooled.to(model.device)
        with torch.no_grad():
            return by_expert(layer.gate(pooled, "default"), config.num_experts)

    def gates(self, model: Any) -> dict[str, list[float]]:
        """Mean gate weight of each expert for the test instructions of each task (paper, Figures 5 to 11)."""
        return self.mean_weights(self.weights(model))

    def mean_weights(self, weights: Float[Tensor, "test experts"]) -> dict[str, list[float]]:
        """`gates`, of the weights that `weights` returned."""
        return {task: own.mean(0).tolist() for task, own in self._by_task(weights).items()}

    def choices(self, weights: Float[Tensor, "test experts"], names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """How decided the gate is on each task's test instructions, and for whom, of what `weights` returned.

        `entropy`, in nats, is the mean over instructions of -sum(w log w), w being the weights of the experts made to
        sum to one: 0 for one expert alone, log(experts) for all alike. `nearest` is the expert with the highest mean
        weight (of equals the first), by its name in `names` [experts].
        """
        share = weights / weights.sum(-1, keepdim=True)
        entropy = self._by_task(torch.special.entr(share).sum(-1))
        return {
            task: {"entropy": entropy[task].mean().item(), "nearest": names[int(own.mean(0).argmax())]}
            for task, own in self._by_task(weights).items()
        }

    def _by_task(self, values: Float[Tensor, "test ..."]) -> dict[str, Float[Tensor, "some ..."]]:
        tasks = sorted({row.category for row in self.test})
        return {task: values[[row.category == task for row in self.test]] for task in tasks}


def _check_hold_out(category: str, train: Sequence[Example]) -> None:
    found = sorted({example.category for example in train})
    if category not in found:
        raise ValueError(f"hold_out={category!r} is no category of the training split: choose one of {found}")
    if len(found) == 1:
        raise ValueError(f"hold_out={category!r} is the only category of the training split, so nothing is left to "
                         "train on: give data of several tasks, or leave hold_out away")  # fmt: skip


def _warn_of_calibration(config: TaskConfig) -> None:
    """Say so where the base was compressed on examples that are about to be tested on."""
    record = Path(local(config.model)) / "compression.json"
    text = json.loads(record.read_text())["calibration"] if record.is_file() else None
    if not text or not text["sequences"] or text["data"] != config.data:
        return
    split = {"seed": config.data_seed, "limit": config.limit, "test_share": config.test_share}
    if text["split"] != split:
        console.print(
            f"{config.model} was calibrated on another split of {config.data} ({text['split']}, here {split}), so on "
            "examples of this test split: compress again with --data-seed, --limit and --test-share as here"
        )
