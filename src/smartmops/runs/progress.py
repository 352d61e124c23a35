"""What a user sees while a run goes on: a bar in a terminal, a line now and then elsewhere, seconds of each phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import Progress
from transformers import TrainerCallback

from smartmops.progress.bars import EVERY, console, duration

ONCE_IN = 2.0  # seconds between two lines at least
WORDS = {"prepare": "preparing", "train": "training", "evaluate": "evaluating"}


class Phases:
    """Says when a phase of a run begins and ends.

    Attributes:
        seconds: Of each phase, by name; a phase that comes twice is added up.
    """

    def __init__(self, shown: bool = True) -> None:
        self.seconds: dict[str, float] = {}
        self.shown = shown

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what is done inside."""
        if self.shown and not console.is_terminal:
            console.print(f"{WORDS[name]} ...")
        started = time.perf_counter()
        yield
        took = time.perf_counter() - started
        self.seconds[name] = self.seconds.get(name, 0.0) + took
        if self.shown:
            console.print(f"{WORDS[name]} took {took:.1f} s")


class Steps(TrainerCallback):
    """Step, loss, perplexity on validation data, and the time that is left."""

    def __init__(self) -> None:
        self.bar = Progress(*Progress.get_default_columns(), console=console, transient=True)
        self.loss = self.validation = ""
        self.started = self.said = 0.0
        self.first = self.told = 0  # steps: done before this process began, and at the last line

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: D102
        self.started = self.said = time.monotonic()
        self.first = self.told = state.global_step
        self.line = self.bar.add_task("training", total=state.max_steps, completed=state.global_step)
        if console.is_terminal:
            self.bar.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:  # noqa: D102
        if logs and "loss" in logs:
            self.loss = f", loss {logs['loss']:.3f}"
            self.bar.update(self.line, description=f"training{self.loss}{self.validation}")
            self._say(state)

    def evaluated(self, perplexity: float) -> None:
        """Take note of an evaluation on validation data."""
        self.validation = f", validation perplexity {perplexity:.3f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: D102
        self.bar.update(self.line, completed=state.global_step)
        if state.global_step % args.logging_steps:  # else the loss of this very step is about to be logged
            self._say(state)

    def _say(self, state: Any) -> None:
        now, step, total = time.monotonic(), state.global_step, state.max_steps
        quiet = now - self.said
        due = (step - self.told >= total / 10 and quiet >= ONCE_IN) or quiet >= EVERY or step == total
        if console.is_terminal or step == self.told or not due:
            return
        left = (now - self.started) / (step - self.first) * (total - step)
        console.print(f"step {step} of {total}{self.loss}{self.validation}, {duration(left)} left", highlight=False)
        self.said, self.told = now, step

    def stop(self) -> None:
        """Take the bar away."""
        self.bar.stop()
