"""The training loop: Hugging Face's `Trainer` with our rates, schedule and clipping, and the best state kept.

Knows a model with an adapter, rows and a schedule. Knows no data set, no run folder and no test split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import load_peft_weights, set_peft_model_state_dict
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from smartmops.attention.packed import Packed
from smartmops.checks.errors import Diverged
from smartmops.evaluation.perplexity import Evaluation
from smartmops.methods.baselines import parameter_groups
from smartmops.options.method import MethodConfig
from smartmops.options.training import Schedule
from smartmops.runs import ranks
from smartmops.runs.progress import Steps

from .kept import Kept, put_state

SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


class _Trainer(Trainer):
    """HF's loop with our parameter groups, stopping at the first loss that is not finite."""

    def __init__(self, config: MethodConfig, kept: Kept, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.method, self.kept, self.good = config, kept, [p.detach().clone() for p in self._trained()]

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
        self.kept.losses.append(float(loss))
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A checkpoint's adapter, and beside it what is kept; `trainer_state.json` comes after both."""
        super().save_model(output_dir, _internal_call)
        if output_dir and self.args.should_save:
            self.kept.save(Path(output_dir))


class _Watch(TrainerCallback):
    """Clips gradients, logs, evaluates on validation data and ends a run that no longer gets better."""

    def __init__(
        self, model: Any, schedule: Schedule, kept: Kept, steps: Steps, write: Callable[[dict[str, Any]], None],
        look: Callable[[], Evaluation] | None, halfway: Callable[[], None] | None,
    ) -> None:  # fmt: skip
        self.model, self.schedule, self.kept, self.steps = model, schedule, kept, steps
        self.write, self.look, self.halfway = write, look, halfway
        self.every = schedule.eval_every or max(1, schedule.steps // 10)
        self.track: Callable[[dict[str, float]], None] = lambda logs: None  # to trackers, where there are any

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.schedule.clip is not None and self.schedule.max_grad_norm is None:
            self.kept.clip((p for p in self.model.parameters() if p.requires_grad), self.schedule.clip)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            logs["loss"], self.kept.losses = fmean(self.kept.losses), []
            row: dict[str, Any] = {k: logs[k] for k in ("loss", "grad_norm", "learning_rate") if k in logs}
            self.write({"step": state.global_step} | row)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        step = state.global_step
        if self.look and (step % self.every == 0 or step == state.max_steps):
            perplexity = self.look().overall
            self.write({"step": step, "eval_perplexity": perplexity})
            self.track({"eval_perplexity": perplexity})
            self.steps.evaluated(perplexity)
            self.kept.see(step, perplexity, self.model)
            control.should_training_stop |= _out_of_patience(self.schedule, self.kept)
        if self.halfway and step == (state.max_steps + 1) // 2:
            self.halfway()
        return control


def _out_of_patience(schedule: Schedule, kept: Kept) -> bool:
    return schedule.patience is not None and kept.waited >= schedule.patience


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
) -> Kept:
    """Train the adapter of `model` in place, and do something `halfway`.

    With `look`, which evaluates it on validation data, the model ends with the best state seen, else with the last. Of
    0 steps the one state is that before training.

    Raises:
        Diverged: the loss is not finite; the model then holds the last state whose loss was.
    """
    kept = Kept.load(checkpoint) if checkpoint else Kept()
    if checkpoint and (_step(checkpoint) >= schedule.steps or _out_of_patience(schedule, kept)):
        set_peft_model_state_dict(model, load_peft_weights(str(checkpoint), device="cpu"))
    elif schedule.steps:
        _run(model, method, schedule, rows, collator, folder, write, look, checkpoint, halfway, kept)
    if look:
        if kept.step is None:  # nothing was trained, so what was prepared is all there is to choose
            kept.see(0, look().overall, model)
        put_state(model, kept.best)
    return kept


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _trackers(schedule: Schedule, folder: Path) -> list[TrainerCallback]:
    """HF's own integrations; TensorBoard's files go beside the checkpoints unless TENSORBOARD_LOGGING_DIR is set."""
    found: list[TrainerCallback] = []
    for kind in get_reporting_integration_callbacks(list(schedule.report_to)):
        each = kind()
        if "tensorboard" in kind.__name__.lower() and each.logging_dir is None:
            each.logging_dir = str(folder.parent / "tensorboard")
        found.append(each)
    return found


def _run(
    model: Any, method: MethodConfig, schedule: Schedule, rows: Sequence[Any],
    collator: Callable[[Sequence[Any]], dict[str, Any]], folder: Path, write: Callable[[dict[str, Any]], None],
    look: Callable[[], Evaluation] | None, checkpoint: Path | None, halfway: Callable[[], None] | None, kept: Kept,
) -> None:  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=schedule.batch_size,
        max_steps=schedule.steps,
        learning_rate=method.rate,
        lr_scheduler_type=SCHEDULERS[schedule.lr_schedule],
        warmup_steps=schedule.warm,
        max_grad_norm=schedule.max_grad_norm or 0.0,
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
    steps = Steps()
    watch = _Watch(model, schedule, kept, steps, write, look, halfway)
    trainer = _Trainer(
        method, kept, model=model, args=arguments, train_dataset=rows, data_collator=collator,
        callbacks=[watch, steps, *_trackers(schedule, folder)],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    if schedule.report_to:
        watch.track = trainer.log
    model.config.use_cache = False
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        steps.stop()
