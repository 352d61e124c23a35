"""Central training: data, base and method in, run folder out. The loop itself is Hugging Face's `Trainer`."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.progress import Progress
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from smartmops.tuner.packed import Packed

from . import ranks
from .answers import questions, score
from .baselines import OURS, MethodConfig, parameter_groups
from .evaluate import Evaluation, samples
from .interference import interference
from .runs import Run, check_adapter
from .selection import TOLD
from .task import Task, TaskConfig

SCHEDULERS = {"linear": "linear", "constant": "constant_with_warmup"}


class Diverged(ValueError):
    """The loss is no longer a finite number; the model holds the last state whose loss was."""


@dataclass(kw_only=True)
class Schedule:
    """How long, how much at a time, from which seed."""

    steps: int = 1000  # optimiser steps
    batch_size: int = 16  # examples; of each process where a launcher started several
    lr_schedule: Literal["linear", "constant"] = "linear"  # down to zero, or level; both after the warm-up
    warmup_steps: int = 50  # optimiser steps
    seed: int = 0
    log_every: int = 20  # optimiser steps
    save_every: int = 200  # optimiser steps between checkpoints a killed run resumes from
    eval_every: int | None = None  # optimiser steps between evaluations on the test split; None: only at the end


@dataclass(kw_only=True)
class TrainConfig(TaskConfig, Schedule):
    """Everything `smartmops train` takes. DATA is office, dolly, superni, a JSONL file, a folder or a hub id."""

    out: Path  # run folder
    samples_per_task: int = 2  # answers of the frozen and the adapted model, side by side in the report
    answers_per_task: int = 0  # test examples of each task answered by both and scored: ROUGE-L and exact match
    answer_tokens: int = 48  # at which a scored answer ends that has not ended itself
    interference_examples: int = 0  # of each training task, whose gradients on the prompts are compared; not for PEFT's
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
    def __init__(self, write: Callable[[dict[str, Any]], None], look: Callable[[], Evaluation] | None,
                 every: int | None, halfway: Callable[[], None] | None) -> None:  # fmt: skip
        self.write, self.look, self.every, self.halfway = write, look, every, halfway

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            row: dict[str, Any] = {k: logs[k] for k in ("loss", "grad_norm", "learning_rate") if k in logs}
            self.write({"step": state.global_step} | row)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.look and self.every and state.global_step % self.every == 0:
            self.write({"step": state.global_step, "eval_perplexity": self.look().overall})
        if self.halfway and state.global_step == (state.max_steps + 1) // 2:
            self.halfway()


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
    halfway: Callable[[], None] | None = None,
) -> None:
    """Train the adapter of `model` in place; `look` at it every so often, and do something `halfway`.

    Raises:
        Diverged: the loss is not finite; the model then holds the last state whose loss was.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=schedule.batch_size,
        max_steps=schedule.steps,
        learning_rate=method.rate,
        lr_scheduler_type=SCHEDULERS[schedule.lr_schedule],
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
        method, model=model, args=arguments, train_dataset=rows, data_collator=collator,
        callbacks=[_Curves(write, look, schedule.eval_every, halfway), progress],
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
    asked = _asked(config, task)
    frozen = ranks.evaluate_together(task.base, task.test, task.collator, progress=True)
    task = task.told(config, config.seed)
    model, names, accuracy = task.adapt(config, config, config.seed)
    gated = len(names) > 1
    before = task.gates(model) if gated else {}
    pulled = ranks.first_does(lambda: _pulled(config, task, model))
    checkpoint = ranks.first_does(lambda: _rewound(run))

    def look() -> Evaluation:
        return ranks.evaluate_together(model, task.test, task.collator)

    def halfway() -> None:
        stages = {"experts": names, "before": before, "during": task.gates(model)}
        run.write_gates(stages)

    write = ranks.only_first(run.append_curve)
    middle = (lambda: ranks.first_does(halfway)) if gated else None
    try:
        fit(model, config, config, *task.feed(model), run.checkpoints, write, look, checkpoint, middle)
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

    def finish() -> dict[str, Any]:
        found = metrics | _measured(config, task, model, asked, pulled)
        if gated:
            weights = task.weights(model)
            stages = {"experts": names, "before": before, "after": task.mean_weights(weights)}
            run.write_gates((run.read_gates() or {}) | stages)
            found["gate"] = task.choices(weights, names)
        speaks = task.embedder is None and config.method not in ("input-prompt-tuning", *TOLD)
        if speaks and config.samples_per_task:
            run.write_samples(samples(model, task.tokenizer, task.test_examples, config.samples_per_task))
        run.write_metrics(found)
        return found

    return ranks.first_does(finish)


def _asked(config: TrainConfig, task: Task) -> list[int]:
    """Numbers of the test examples whose answers are to be scored."""
    if not config.answers_per_task:
        return []
    return questions(task.base, task.tokenizer, task.test_examples, config.answers_per_task, config.answer_tokens)


def _pulled(config: TrainConfig, task: Task, model: Any) -> dict[str, Any]:
    """How the tasks' gradients on the prompts agree at present; empty where not asked for, or where there are none."""
    if not config.interference_examples or config.method not in OURS:
        return {}
    return interference(task, model, config.interference_examples)


def _measured(
    config: TrainConfig, task: Task, model: Any, asked: Sequence[int], pulled: dict[str, Any]
) -> dict[str, Any]:
    """What was asked for beside perplexity; `pulled` is what `_pulled` found before training."""
    found: dict[str, Any] = {}
    if asked:
        examples, rows = [task.test_examples[i] for i in asked], [task.test[i] for i in asked]
        found["answers"] = score(model, task.tokenizer, examples, rows, config.answer_tokens)
    if pulled:
        found["interference"] = {"before": pulled, "after": _pulled(config, task, model)}
    return found


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
