"""Options of `train`, `compare` and `quickstart`: which base, which data, how long, how much at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from smartmops.checks.columns import FieldsOfColumns
from smartmops.checks.errors import RunError
from smartmops.checks.folders import OutFolder, WordOrFile, WordOrFolder, refused
from smartmops.checks.limits import (
    Count,
    Number,
    Options,
    Positive,
    Rate,
    Seed,
    Several,
    Share,
    Text,
    Whole,
    typed,
    unused,
)
from smartmops.traits import METHODS

from .method import (
    NONE,
    GatePretraining,
    Method,
    MethodConfig,
    gate_idle,
    gate_problems,
    method_idle,
    method_problems,
)

# The setting of the results on the embedded base in experiments/ and of `reproduce`, whose cells do not name it:
# experts are hidden states as in the paper, and the schedule is what Hugging Face's Trainer does by itself, with a
# fixed warm-up and every example trained on.
EMBEDDED_SETTING: dict[str, Any] = {
    "lr_schedule": "linear", "warmup_steps": 50, "max_grad_norm": 1.0, "validation_share": 0.0,
    "expert_kind": "hidden_states", "gate_lr": 1e-3,
}  # fmt: skip


@dataclass(frozen=True)
class Apart:
    """Several data, none of which is another one, or a part of it."""

    def wrong(self, value: tuple[str, ...]) -> str | None:
        """As `limits.Limit`."""
        if not value:
            return " is given nothing: name at least one, such as yours.jsonl"
        places = [Path(each).resolve() if Path(each).exists() else Path(each) for each in value]
        for number, (name, place) in enumerate(zip(value, places, strict=True)):
            for other, there in zip(value[:number], places, strict=False):
                if name == other:
                    return f": {name} is named twice, name each once"
                if place == there:
                    return f": {other} and {name} are the same, name it once"
                if there in place.parents or place in there.parents:
                    inner, outer = (name, other) if there in place.parents else (other, name)
                    return f": {inner} lies in {outer}, whose files are all read: name one of them"
        return None


Model = Annotated[str, Text("a model folder, a hub id, a *.gguf file, smollm2 or tiny")]
Base = Annotated[Model, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
Data = Annotated[str, Text("office, dolly, superni, a file, a folder or a hub id")]
Datas = Annotated[Data | Annotated[tuple[Data, ...], Apart()], tyro.conf.arg(metavar="DATA...")]
Columns = Annotated[tuple[str, ...], FieldsOfColumns()]
Activations = Annotated[str, WordOrFolder(("auto", "memory", "off"))]
Template = Annotated[str, WordOrFile(("auto", "chat", "plain"), "a file with a Jinja template")]
Rows = Annotated[str, WordOrFolder(("memory",))]
Zeros = Annotated[float, Number("a share of zeros between 0 and 1, such as 0.75", 0, 1, above=True, below=True)]
Held = Annotated[float, Number("a share from 0 (none) to 0.5, such as 0.1", 0, 0.5)]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
Warmup = Number("a share of the steps from 0 to below 1, such as 0.06, or give --warmup-steps", 0, 1, below=True)


@dataclass(kw_only=True)
class BaseOptions:
    """The frozen base model, and how it is opened."""

    ABOUT: ClassVar[str] = "base"

    model: Base  # base model: a folder, a *.gguf file, a hub id, smollm2 or tiny
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """type of the frozen weights; auto: bfloat16 where the processor computes faster in it"""
    template: Template = "auto"
    """how prompts are formatted: chat (the tokenizer's template), plain, a Jinja file, or auto (chat if there is)"""
    activations: Activations = "auto"
    """where activations below the injection layer are cached: memory, off, a folder, or auto (memory if they fit)"""


@dataclass(kw_only=True)
class DataOptions:
    """Which examples, and how they are shared out among training and test."""

    ABOUT: ClassVar[str] = "data"

    data: Datas  # office, dolly, superni, a JSON, JSONL, CSV, TSV or Parquet file, a folder, or a hub id; or several
    columns: Columns = ()  # FIELD=COLUMN where the data name their columns differently, such as response=answer
    max_length: Count = 512  # tokens of an example; a longer one is shortened at the end of its context
    limit: Count | None = None  # number of examples to use, drawn at random; all of them by default
    test_share: Share = 0.1  # share of each category that is held out for testing
    data_seed: Seed = 0
    """seed of the draw and of the split, kept apart so that runs with other seeds are tested on the same examples"""
    validation: bool = False  # test on a part of the training split instead of the test split, to choose settings by
    hold_out: str | None = None  # category that is left out of training and still tested, to measure an unseen task
    rows: Rows = "memory"  # where texts and tokens are kept: memory, or a folder that they are mapped from


@dataclass(kw_only=True)
class Recovery:
    """Prompts that are trained first, to recover what compression lost."""

    ABOUT: ClassVar[str] = "preparation"

    recovery_prompts: Whole | None = None
    """number of frozen prompts at the input, trained first; by default 10 with hidden_states, else 0"""
    recovery_steps: Whole = 20  # optimiser steps for recovery prompts
    recovery_lr: Rate = 0.03  # learning rate of recovery prompts (Adam)


@dataclass(kw_only=True)
class Batches:
    """How many examples at a time, from which seed."""

    ABOUT: ClassVar[str] = "training"

    batch_size: Count = 16  # examples in a batch; for each process where a launcher started several
    seed: Seed = 0  # seed of experts, gate and order of examples


VALIDATION_PART = "the part of the training split that --validation tests on"


@dataclass(kw_only=True)
class TaskConfig(Options, Batches, MethodConfig, GatePretraining, Recovery, DataOptions, BaseOptions):
    """What is adapted to which data, and how both are read."""

    common: ClassVar[tuple[str, ...]] = ("experts", "prompts_per_expert", "expert_kind")

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

    @property
    def measured_on(self) -> dict[str, str]:
        """What `metrics.json` says of where perplexities are from; nothing where it is the test split."""
        return {"measured_on": VALIDATION_PART} if self.validation else {}

    def trained(self) -> list[str]:
        """The methods that are trained, as `method_problems` knows them."""
        return [self.method]

    def problems(self) -> Iterator[str]:
        """What options have to do with each other."""
        methods = self.trained()
        yield from method_problems(self, methods)
        yield from gate_problems(self, self.experts)
        if self.answers_alone and self.recovery_prompts and any(METHODS[method].ours for method in methods):
            yield (f"--recovery-prompts {self.recovery_prompts} are seen by every token, and instructions are left to "
                   "the bare base: choose 0 of them, or --visible-to all")  # fmt: skip

    def idle(self) -> Iterator[str]:
        """As `Options`."""
        methods = self.trained()
        yield from method_idle(self, methods)
        yield from gate_idle(self, self, methods)
        ours = any(METHODS[method].ours for method in methods)
        yield from unused(self, ("recovery_prompts", "activations"), ours, f"is of experts, {NONE}, or leave it away")
        yield from unused(
            self, ("recovery_steps", "recovery_lr", "keep_recovery_prompts"), self.recovered_by > 0 and ours,
            "is of recovery prompts, and there are none: give --recovery-prompts, or leave it away",
        )  # fmt: skip


@dataclass(kw_only=True)
class ValidationConfig:
    """What is held out of the training split, so that the best state can be kept."""

    ABOUT: ClassVar[str] = "validation"

    validation_share: Held = 0.1
    """share of each task's training examples on which the best state is chosen; 0: the last state is kept"""
    validation_limit: Count = 200  # largest number of validation examples


@dataclass(kw_only=True)
class Evaluations:
    """How often the held-out examples are evaluated, and for how long without a gain."""

    ABOUT: ClassVar[str] = "validation"

    eval_every: Count | None = None
    """optimiser steps between evaluations on validation data; by default up to ten in a run"""
    patience: Count | None = None
    """training ends after this number of evaluations without a better one; never by default"""


@dataclass(kw_only=True)
class Logging:
    """How often something is written down."""

    ABOUT: ClassVar[str] = "run"

    log_every: Count = 20  # optimiser steps between logged losses
    save_every: Count = 200  # optimiser steps between checkpoints, from which a killed run resumes
    report_to: tuple[Tracker, ...] = ()
    """trackers that receive loss and perplexity through the integrations of Hugging Face; none by default"""


@dataclass(kw_only=True)
class Schedule(Batches, Evaluations, Logging):
    """How long, how much at a time, from which seed."""

    ABOUT: ClassVar[str] = "training"

    steps: Whole = 1000  # optimiser steps; 0: only what comes before training is done
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """learning rate after the warm-up: falling to zero along a cosine or a line, or constant"""
    warmup: Annotated[float, Warmup] = 0.06  # share of the steps in which the learning rate rises
    warmup_steps: Whole | None = None  # number of warm-up steps, in place of the share; at most a fifth of all steps
    clip: Positive | None = 2.0  # gradients are clipped to this multiple of the median norm of recent steps
    max_grad_norm: Positive | None = None  # absolute norm to which gradients are clipped, in place of the median

    @property
    def warm(self) -> int:
        """Optimiser steps of the warm-up."""
        if self.warmup_steps is not None:
            return min(self.warmup_steps, self.steps // 5)
        return round(self.warmup * self.steps)


@dataclass(kw_only=True)
class TrainConfig(TaskConfig, ValidationConfig, Schedule):
    """Everything `smartmops train` takes. DATA is office, dolly, superni, a JSONL file, a folder or a hub id."""

    ABOUT: ClassVar[str] = "run"

    out: OutFolder  # run folder to write
    samples_per_task: Whole = 2
    """answers per task of the frozen and the adapted model, shown side by side in the report"""
    answers_per_task: Whole = 0  # test examples per task that both models answer, scored by ROUGE-L and exact match
    answer_tokens: Count = 48  # largest number of tokens of a scored answer
    interference_examples: Whole = 0
    """examples per training task whose gradients on the prompts are compared; not for PEFT's methods"""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # continue a run that was killed

    def problems(self) -> Iterator[str]:
        """What options have to do with each other."""
        yield from super().problems()
        for name in self.report_to:
            if find_spec(name) is None:
                yield f"--report-to {name}: {name} is not installed: pip install {name}"
        if self.patience is not None and not self.validation_share:
            yield (f"--patience {self.patience} waits for evaluations on validation data, and there are none with "
                   "--validation-share 0: choose a share above 0, or leave --patience away")  # fmt: skip

    def idle(self) -> Iterator[str]:
        """As `Options`."""
        yield from super().idle()
        away, traits = "leave one of them away", [METHODS[method] for method in self.trained()]
        yield from unused(self, ("interference_examples",), any(each.ours for each in traits),
                          f"is of prompts of ours, {NONE}, or leave it away")  # fmt: skip
        yield from unused(self, ("samples_per_task",),
                          self.embedder is None and any(each.answers for each in traits),
                          "is of answers to a text alone, which such a method, or one with --embedder, is not asked "
                          "for: leave it away")  # fmt: skip
        yield from unused(self, ("answer_tokens",), self.answers_per_task > 0,
                          "is of scored answers, and there are none: give --answers-per-task, or "
                          "leave it away")  # fmt: skip
        yield from unused(self, ("validation_limit", "eval_every"), self.validation_share > 0,
                          "is of validation data, and there are none: choose --validation-share, or "
                          "leave it away")  # fmt: skip
        yield from unused(self, ("warmup",), self.warmup_steps is None, f"gives way to --warmup-steps: {away}")
        yield from unused(self, ("clip",), self.max_grad_norm is None, f"gives way to --max-grad-norm: {away}")

    def taken(self) -> RunError | None:
        """As `Options`."""
        return refused(self.out, self.resume)


@dataclass(kw_only=True)
class CompareConfig(TrainConfig):
    """A `TrainConfig` whose `method` gives way to several, each at its own learning rate."""

    ABOUT: ClassVar[str] = "comparison"

    methods: dict[Method, Rate | None] = field(default_factory=dict)
    """methods, each with its learning rate or None; by default prompt-tuning and mops"""
    seeds: Annotated[tuple[Seed, ...], Several("0 1 2")] = (0,)  # seeds; each is a run of its own
    sparsity: Zeros | None = None  # share of weights to set to zero first, by magnitude
    shots: Whole = 4  # solved examples in the context of the frozen model, as a mark to compare with

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

    def idle(self) -> Iterator[str]:
        """As `Options`; and what stands for one method or seed where several are compared."""
        yield from super().idle()
        yield from unused(self, ("method", "prompt_lr"), False,
                          "is of one method, and compare trains several: name each with its rate "
                          "by --methods")  # fmt: skip
        yield from unused(self, ("relative_lr",), None in self.compared.values(),
                          "gives way to the rates of --methods: leave one of them away")  # fmt: skip
        yield from unused(self, ("seed",), False, f"is one seed, and compare takes several: write --seeds {self.seed}")
