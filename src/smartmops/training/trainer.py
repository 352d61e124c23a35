"""Central training: data, base and method in, run folder out. The loop itself is Hugging Face's `Trainer`."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from smartmops.compression.base import load_base, local
from smartmops.data.batches import Collator, Encoded, encode_all, packed
from smartmops.data.example import Example
from smartmops.data.tasks import splits
from smartmops.tuner import MoPsModel
from smartmops.tuner.gate import by_expert
from smartmops.tuner.packed import Packed

from . import ranks
from .activations import ActivationCache, free_memory
from .baselines import MethodConfig, build, parameter_groups
from .evaluate import Evaluation, samples
from .pretrain import (
    Embedder,
    GatePretraining,
    assign,
    initialise,
    instructions,
    pretrain_gate,
    standardise,
    train_recovery,
)  # fmt: skip
from .runs import Run, check_adapter

console = Console()


class Diverged(ValueError):
    """The loss is no longer a finite number; the model holds the last state whose loss was."""


@dataclass(kw_only=True)
class Schedule:
    """How long, how much at a time, from which seed."""

    steps: int = 1000  # optimiser steps
    batch_size: int = 16  # examples; of each process where a launcher started several
    warmup_steps: int = 50  # optimiser steps; then linearly down to zero
    seed: int = 0
    log_every: int = 20  # optimiser steps
    save_every: int = 200  # optimiser steps between checkpoints a killed run resumes from
    eval_every: int | None = None  # optimiser steps between evaluations on the test split; None: only at the end


@dataclass(kw_only=True)
class TrainConfig(MethodConfig, GatePretraining, Schedule):
    """Everything `smartmops train` takes. DATA is office, dolly, superni, a JSONL file, a folder or a hub id."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]  # a local folder, a hub id, or tiny
    data: str
    out: Path  # run folder
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the frozen base; prompts and gate are trained in float32
    max_length: int = 512  # tokens; longer examples lose the end of their context
    limit: int | None = None  # use only so many examples, drawn at random (the paper: 5000)
    test_share: float = 0.1  # of each category
    recovery_prompts: int = 0  # frozen prompts at the input, trained first
    recovery_steps: int = 20  # optimiser steps
    recovery_lr: float = 0.03
    samples_per_task: int = 2  # answers of the frozen and the adapted model, side by side in the report
    activations: str = (
        "auto"  # what the lower half makes of the data: kept in memory if it fits; memory, off or a folder
    )
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # go on where a killed run stopped


class _Trainer(Trainer):
    """HF's loop with our parameter groups, stopping at the first loss that is not finite."""

    def __init__(self, config: MethodConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.method, self.good = config, [p.detach().clone() for p in self._trained()]

    def _trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def create_optimizer(self, model: Any = None) -> Any:
        if getattr(self, "optimizer", None) is None:
            self.optimizer: Any = torch.optim.AdamW(parameter_groups(self.model, self.method), weight_decay=0.0)
        return self.optimizer

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Of all processes together, the mean over response tokens; HF sees to that where labels are not packed."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if ranks.world() == 1 or "packed" not in inputs:
            return loss
        return loss * ranks.share(len(Packed.of(inputs["packed"]).targets()[0]), loss.device)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = ranks.mean(super().training_step(*args, **kwargs))
        if not torch.isfinite(loss):
            for parameter, value in zip(self._trained(), self.good, strict=True):
                parameter.data.copy_(value)
            raise Diverged(f"loss became {loss.item()} at step {self.state.global_step + 1} with learning rate "
                           f"{self.method.rate}: choose a smaller prompt_lr")  # fmt: skip
        self.good = [p.detach().clone() for p in self._trained()]
        return loss


class _Curves(TrainerCallback):
    def __init__(
        self, write: Callable[[dict[str, Any]], None], look: Callable[[], Evaluation] | None, every: int | None
    ):
        self.write, self.look, self.every = write, look, every

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            row: dict[str, Any] = {k: logs[k] for k in ("loss", "grad_norm", "learning_rate") if k in logs}
            self.write({"step": state.global_step} | row)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.look and self.every and state.global_step % self.every == 0:
            self.write({"step": state.global_step, "eval_perplexity": self.look().overall})


class _Progress(TrainerCallback):
    """One line: step, loss, time left."""

    def __init__(self) -> None:
        self.bar = Progress(*Progress.get_default_columns(), transient=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.line = self.bar.add_task("training", total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(self.line, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.bar.update(self.line, description=f"training, loss {logs['loss']:.3f}")


def fit(
    model: Any,
    method: MethodConfig,
    schedule: Schedule,
    rows: Sequence[Any],
    collator: Callable[[Sequence[Any]], dict[str, Any]],
    folder: Path,
    write: Callable[[dict[str, Any]], None] = lambda row: None,
    look: Callable[[], Evaluation] | None = None,
    checkpoint: Path | None = None,
) -> None:
    """Train the adapter of `model` in place.

    Raises:
        Diverged: the loss is not finite; the model then holds the last state whose loss was.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=schedule.batch_size,
        max_steps=schedule.steps,
        learning_rate=method.rate,
        lr_scheduler_type="linear",
        warmup_steps=min(schedule.warmup_steps, schedule.steps // 5),
        logging_steps=schedule.log_every,
        logging_nan_inf_filter=False,
        save_steps=schedule.save_every,
        save_strategy="steps" if schedule.save_every <= schedule.steps else "no",
        save_total_limit=2,
        seed=schedule.seed,
        data_seed=schedule.seed,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=ranks.on_cpu(),
    )
    progress = _Progress()
    trainer = _Trainer(
        method, model=model, args=arguments, train_dataset=list(rows), data_collator=collator,
        callbacks=[_Curves(write, look, schedule.eval_every), progress],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    model.config.use_cache = False
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.bar.stop()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; one torn by a kill (no `trainer_state.json`, which comes last) is removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    while found:
        try:
            json.loads((found[-1] / "trainer_state.json").read_text())
            check_adapter(found[-1])
            return found[-1]
        except (OSError, ValueError):
            shutil.rmtree(found.pop())
    return None


@dataclass
class Task:
    """A frozen base with the data it is to be adapted to: what every method compared in one sitting shares."""

    base: Any
    tokenizer: Any
    train: list[Encoded]
    test: list[Encoded]
    train_examples: list[Example]
    test_examples: list[Example]
    collator: Collator
    recovery: torch.Tensor | None = None
    embedder: Embedder | None = None
    activations: str = "auto"
    caches: dict[Any, ActivationCache | None] = field(default_factory=dict)

    @classmethod
    def load(cls, config: TrainConfig, base: Any = None, tokenizer: Any = None) -> Task:
        """Read, split and encode the data, load the base unless given, train recovery prompts; says what was cut."""
        if base is None:
            base, tokenizer = load_base(config.model, config.dtype)
        train, test = splits(config.data, config.limit, config.test_share, config.seed)
        _warn_of_calibration(config)
        limit = min(config.max_length, getattr(base.config, "max_position_embeddings", config.max_length))
        collator = Collator(tokenizer)
        encoded = [encode_all(part, tokenizer, limit) for part in (train, test)]
        for name, part in zip(("train", "test"), encoded, strict=True):
            console.print(f"{name}: {len(part.rows)} examples; {part.truncation}")
        train, test = ([part[i] for i in e.kept] for part, e in zip((train, test), encoded, strict=True))
        embedder = Embedder(config.embedder) if config.embedder else None
        rows = [_embedded(e.rows, part, embedder) for e, part in zip(encoded, (train, test), strict=True)]
        task = cls(base, tokenizer, rows[0], rows[1], train, test, collator, None, embedder, config.activations)
        if config.recovery_prompts:
            size = config.batch_size * ranks.world()
            task.recovery = train_recovery(base, task.train, collator, config.recovery_prompts, config.recovery_steps,
                                           config.recovery_lr, size, config.seed)  # fmt: skip
        return task

    def adapt(self, method: MethodConfig, gate: GatePretraining, seed: int) -> tuple[Any, list[str], float | None]:
        """A fresh adapter, experts initialised and gate pretrained; also expert names and the gate's accuracy."""
        set_seed(seed)
        width = self.embedder.width if self.embedder and method.method == "mops" else None
        model = build(self.base, method, self.recovery, width)
        if method.method not in ("mops", "prompt-tuning"):
            return model, [], None
        config = model.base_model.layer().configs["default"]
        names, expert_of, accuracy = ["all"], [0] * len(self.train), None
        if config.num_experts > 1:
            cache = self.cache(model)
            pooled = instructions(model, self.train) if cache is None else cache.pooled.to(model.device)
            standardise(model, pooled)
            how = gate.gate_pretraining if gate.gate_pretraining != "none" else "clusters"
            expert_of, names = assign(self.train, pooled, config.num_experts, how, seed, gate.expert_names)
            if gate.gate_pretraining != "none":
                accuracy = pretrain_gate(model, pooled, torch.tensor(expert_of), gate)
            config.expert_names = names
        if method.init == "hidden_states":
            initialise(model, self.train, self.collator, expert_of, seed)
        return model, names, accuracy

    def cache(self, model: Any) -> ActivationCache | None:
        """The lower half's results on the training split, computed once for all methods and seeds that share it."""
        config = model.base_model.layer().configs["default"]
        key = (config.injection_layer, config.num_recovery_prompts, config.gate_input, config.embedding_size)
        if key not in self.caches:
            self.caches[key] = self._fill(model)
        return self.caches[key]

    def _fill(self, model: Any) -> ActivationCache | None:
        if self.activations == "off":
            return None
        if self.activations == "auto":
            need, free = ranks.on_this_machine() * ActivationCache.size(model, self.train), free_memory()
            if free is not None and need > free / 4:
                console.print(
                    f"activations would take {need / 2**30:.1f} GiB, over a quarter of the {free / 2**30:.1f} GiB of "
                    "free memory, so the lower half runs in every step; --activations DIR keeps them on disk"
                )
                return None
        folder = None if self.activations in ("auto", "memory") else Path(self.activations)
        return ActivationCache.fill(model, self.train, folder)

    def feed(self, model: Any) -> tuple[Sequence[Any], Callable[[Sequence[Any]], dict[str, Any]]]:
        """A data set and its collator for `fit`: MoPs train on examples end to end, from the injection layer up."""
        if not isinstance(model.base_model, MoPsModel):
            return self.train, self.collator
        cache = self.cache(model)
        return (self.train, packed) if cache is None else (range(len(cache)), cache)

    def gates(self, model: Any) -> dict[str, list[float]]:
        """Mean gate weight of each expert for the test instructions of each task (paper, Figures 5 to 11)."""
        model.eval()
        layer = model.base_model.layer()
        config = layer.configs["default"]
        with torch.no_grad():
            weights = by_expert(layer.gate(instructions(model, self.test), "default"), config.num_experts)
        tasks = sorted({row.category for row in self.test})
        return {t: weights[[row.category == t for row in self.test]].mean(0).tolist() for t in tasks}


def _warn_of_calibration(config: TrainConfig) -> None:
    """Say so where the base was compressed on examples that are about to be tested on."""
    record = Path(local(config.model)) / "compression.json"
    text = json.loads(record.read_text())["calibration"] if record.is_file() else None
    if not text or not text["sequences"] or text["data"] != config.data:
        return
    split = {"seed": config.seed, "limit": config.limit, "test_share": config.test_share}
    if text["split"] != split:
        console.print(
            f"{config.model} was calibrated on another split of {config.data} ({text['split']}, here {split}), so on "
            "examples of this test split: compress again with --data-seed, --limit and --test-share as here"
        )


def _embedded(rows: list[Encoded], examples: list[Example], embedder: Embedder | None) -> list[Encoded]:
    if embedder is None:
        return rows
    found = torch.tensor(embedder([example.instruction for example in examples]))
    return [replace(row, gate_embedding=vector) for row, vector in zip(rows, found, strict=True)]


def train(config: TrainConfig) -> dict[str, Any]:
    """Train one method on one data set and write the run folder; returns what `metrics.json` holds.

    Raises:
        FileExistsError: `out` holds a run already and `resume` is off.
        ValueError: data, options or base do not fit; the message names value, limit and way out.
        Diverged: the loss is not finite; the last good adapter is in `out`/adapter.
    """
    ranks.join()
    run, metrics = ranks.first_does(lambda: _begin(config))
    if metrics:
        return metrics
    task = Task.load(config)
    frozen = ranks.evaluate_together(task.base, task.test, task.collator, progress=True)
    model, names, accuracy = task.adapt(config, config, config.seed)
    gated = len(names) > 1
    before = task.gates(model) if gated else {}
    checkpoint = ranks.first_does(lambda: _rewound(run))

    def look() -> Evaluation:
        return ranks.evaluate_together(model, task.test, task.collator)

    write = ranks.only_first(run.append_curve)
    try:
        fit(model, config, config, *task.feed(model), run.checkpoints, write, look, checkpoint)
    except Diverged as error:
        ranks.first_does(lambda: run.save_adapter(model.save_pretrained))
        raise Diverged(f"{error}; the last good adapter is in {run.adapter_dir}") from None
    ranks.first_does(lambda: run.save_adapter(model.save_pretrained))
    after = ranks.evaluate_together(model, task.test, task.collator, progress=True)
    assert math.isfinite(after.overall)
    metrics = after.metrics() | {
        "perplexity_frozen": frozen.metrics()["perplexity"],
        "gate_pretraining_accuracy": accuracy,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "examples": {"train": len(task.train), "test": len(task.test)},
    }

    def finish() -> None:
        if gated:
            run.write_gates({"experts": names, "before": before, "after": task.gates(model)})
        if task.embedder is None and config.samples_per_task and config.method != "input-prompt-tuning":
            run.write_samples(samples(model, task.tokenizer, task.test_examples, config.samples_per_task))
        run.write_metrics(metrics)

    ranks.first_does(finish)
    return metrics


def _begin(config: TrainConfig) -> tuple[Run, dict[str, Any]]:
    """The run, and its metrics where it is finished."""
    run = Run.create(
        config.out,
        {"command": "train", "arguments": asdict(config), "seed": config.seed, "base": config.model,
         "data": config.data, "method": config.method},
        config.resume,
    )  # fmt: skip
    return run, run.read_metrics()


def _rewound(run: Run) -> Path | None:
    """The checkpoint to go on from; what was logged after it is discarded."""
    checkpoint = last_checkpoint(run.checkpoints)
    run.rewind(int(checkpoint.name.split("-")[1]) if checkpoint else 0)
    return checkpoint
