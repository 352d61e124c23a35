"""Options of `train`, `compare` and `quickstart`: which base, which data, how long, how much at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from smartmops.checks.columns import FieldsOfColumns
from smartmops.checks.folders import OutFolder, WordOrFile, WordOrFolder, refused
from smartmops.checks.limits import Count, Number, Options, Positive, Rate, Seed, Several, Share, Text, Whole, typed

from .method import OURS, GatePretraining, Method, MethodConfig, gate_problems, method_problems

# The setting of the results on the embedded base in experiments/ and of `reproduce`, whose cells do not name it:
# experts are hidden states as in the paper, and the schedule is what Hugging Face's Trainer does by itself, with a
# fixed warm-up and every example trained on.
EMBEDDED_SETTING: dict[str, Any] = {
    "lr_schedule": "linear", "warmup_steps": 50, "max_grad_norm": 1.0, "validation_share": 0.0,
    "expert_kind": "hidden_states", "gate_lr": 1e-3,
}  # fmt: skip


Model = Annotated[str, Text("a model folder, a hub id, a *.gguf file, smollm2 or tiny")]
Base = Annotated[Model, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
Data = Annotated[str, Text("office, dolly, superni, a file, a folder or a hub id")]
Columns = Annotated[tuple[str, ...], FieldsOfColumns()]
Activations = Annotated[str, WordOrFolder(("auto", "memory", "off"))]
Template = Annotated[str, WordOrFile(("auto", "chat", "plain"), "a file with a Jinja template")]
Rows = Annotated[str, WordOrFolder(("memory",))]
Zeros = Annotated[float, Number("a share of zeros between 0 and 1, such as 0.75", 0, 1, above=True, below=True)]
Held = Annotated[float, Number("a share from 0 (none) to 0.5, such as 0.1", 0, 0.5)]
Warmup = Number("a share of the steps from 0 to below 1, such as 0.06, or give --warmup-steps", 0, 1, below=True)


@dataclass(kw_only=True)
class TaskConfig(Options, MethodConfig, GatePretraining):
    """What is adapted to which data, and how both are read."""

    model: Base  # folder, *.gguf, hub id, smollm2, tiny
    data: Data  # office, dolly, superni, a JSON, JSONL, CSV, TSV or Parquet file, a folder, or a hub id
    columns: Columns = ()  # FIELD=COLUMN where columns of the data have names of their own: response=answer
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the frozen base; auto: bfloat16 where it is faster
    template: Template = "auto"
    """chat: the tokenizer's own; plain: a frame; or a Jinja file. auto: chat if there is one"""
    max_length: Count = 512  # tokens; longer examples lose the end of their context
    limit: Count | None = None  # use only so many examples, drawn at random (the paper: 5000)
    test_share: Share = 0.1  # of each category
    batch_size: Count = 16  # examples; of each process where a launcher started several
    seed: Seed = 0  # of experts, gate and order
    data_seed: Seed = 0  # of the draw and the split, so that runs of different seeds are tested on the same examples
    validation: bool = False  # hold out a part of the training split instead of the test split: to choose settings by
    hold_out: str | None = None  # a category to train nothing on, tested all the same: what an unseen task gains
    recovery_prompts: Whole | None = None  # frozen prompts at the input, trained first; None: 10 with hidden_states
    recovery_steps: Whole = 20  # optimiser steps
    recovery_lr: Rate = 0.03  # Adam's rate
    activations: Activations = "auto"
    """what the lower half makes of the data: kept in memory if it fits; memory, off or a folder"""
    rows: Rows = "memory"  # texts and tokens of the data: kept in memory, or written to a folder and mapped from there

    @property
    def recovered_by(self) -> int:
        """Number of recovery prompts."""
        if self.recovery_prompts is not None:
            return self.recovery_prompts
        return 10 if self.expert_kind == "hidden_states" else 0  # the best in the ablation of docs/evidence.md

    @property
    def folder(self) -> Path | None:
        """That texts and tokens are mapped from."""
        return None if self.rows == "memory" else Path(self.rows)

    def trained(self) -> list[str]:
        """The methods that are trained, as `method_problems` knows them."""
        return [self.method]

    def problems(self) -> Iterator[str]:
        """What options have to do with each other."""
        methods = self.trained()
        yield from method_problems(self, methods)
        yield from gate_problems(self, self.experts)
        if self.answers_alone and self.recovery_prompts and any(method in OURS for method in methods):
            yield (f"--recovery-prompts {self.recovery_prompts} are seen by every token, and instructions are left to "
                   "the bare base: choose 0 of them, or --visible-to all")  # fmt: skip


@dataclass(kw_only=True)
class ValidationConfig:
    """What is held out of the training split, so that the best state can be kept."""

    validation_share: Held = 0.1  # of each task's training examples: the state best on them is kept; 0: the last one
    validation_limit: Count = 200  # examples at most


@dataclass(kw_only=True)
class Schedule:
    """How long, how much at a time, from which seed."""

    steps: Whole = 1000  # optimiser steps; 0: only what comes before training
    batch_size: Count = 16  # examples; of each process where a launcher started several
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"  # down to zero, or level; all after the warm-up
    warmup: Annotated[float, Warmup] = 0.06  # share of the steps
    warmup_steps: Whole | None = None  # optimiser steps in place of the share, but at most a fifth of all
    clip: Positive | None = 2.0  # gradients are cut to so many times their median norm of late; None: never
    max_grad_norm: Positive | None = None  # an absolute norm to which they are cut instead
    seed: Seed = 0  # of experts, gate and order
    log_every: Count = 20  # optimiser steps
    save_every: Count = 200  # optimiser steps between checkpoints a killed run resumes from
    eval_every: Count | None = None  # optimiser steps between evaluations on validation data; None: up to ten a run
    patience: Count | None = None  # evaluations without a better one, after which training ends; None: never

    @property
    def warm(self) -> int:
        """Optimiser steps of the warm-up."""
        if self.warmup_steps is not None:
            return min(self.warmup_steps, self.steps // 5)
        return round(self.warmup * self.steps)


@dataclass(kw_only=True)
class TrainConfig(TaskConfig, ValidationConfig, Schedule):
    """Everything `smartmops train` takes. DATA is office, dolly, superni, a JSONL file, a folder or a hub id."""

    out: OutFolder  # run folder
    samples_per_task: Whole = 2  # answers of the frozen and the adapted model, side by side in the report
    answers_per_task: Whole = 0  # test examples of each task answered by both and scored: ROUGE-L and exact match
    answer_tokens: Count = 48  # at which a scored answer ends that has not ended itself
    interference_examples: Whole = 0
    """of each training task, whose gradients on the prompts are compared; not for PEFT's"""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # go on where a killed run stopped

    def problems(self) -> Iterator[str]:
        """What options have to do with each other."""
        yield from super().problems()
        if self.patience is not None and not self.validation_share:
            yield (f"--patience {self.patience} waits for evaluations on validation data, and there are none with "
                   "--validation-share 0: choose a share above 0, or leave --patience away")  # fmt: skip

    def taken(self) -> OSError | None:
        """As `Options`."""
        return refused(self.out, self.resume)


@dataclass(kw_only=True)
class CompareConfig(TrainConfig):
    """A `TrainConfig` whose `method` gives way to several, each at its own learning rate."""

    methods: dict[Method, Rate | None] = field(default_factory=dict)  # and rates; none given: prompt-tuning and mops
    seeds: Annotated[tuple[Seed, ...], Several("0 1 2")] = (0,)  # each is a run of its own
    sparsity: Zeros | None = None  # prune the base by magnitude first: share of zeros
    shots: Whole = 4  # solved examples in the context of the frozen model, as the mark to reach

    @property
    def compared(self) -> dict[Method, float | None]:
        """Methods and their rates."""
        return self.methods or {"prompt-tuning": None, "mops": None}

    def trained(self) -> list[str]:
        """As `TaskConfig`."""
        return list(self.compared)

    def problems(self) -> Iterator[str]:
        """As `TrainConfig`; and what only `train` measures."""
        yield from super().problems()
        for name in ("answers_per_task", "interference_examples"):
            if value := getattr(self, name):
                yield f"{typed(name)} {value}, but compare does not measure that: use train, once for each method"
        if self.hold_out is not None and self.shots:
            yield (f"--hold-out {self.hold_out} leaves no solved examples of that task for --shots {self.shots}: "
                   "choose --shots 0")  # fmt: skip
