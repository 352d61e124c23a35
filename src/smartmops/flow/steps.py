"""The steps that commands are made of: begin a run, open and read, adapt and prepare, fit, measure, keep.

Knows how they follow one another. Knows no loop over methods, seeds or rounds.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from smartmops.checks.errors import DiskError, SmartmopsError
from smartmops.checks.folders import expanded, held_by
from smartmops.checks.limits import check
from smartmops.checks.lock import alone
from smartmops.checks.resources import translated
from smartmops.data.several import names_of
from smartmops.evaluation.measure import measured
from smartmops.evaluation.perplexity import Evaluation, samples
from smartmops.fitting.kept import Kept, state_of
from smartmops.fitting.loop import fit
from smartmops.fitting.validation import settle, spacing
from smartmops.options.training import TaskConfig, TrainConfig
from smartmops.preparing import gating
from smartmops.preparing.adapting import adapt, recovered
from smartmops.preparing.selection import told
from smartmops.progress.bars import console
from smartmops.reading.early import Tasked, check_tasks, counted
from smartmops.reading.task import Task
from smartmops.runs import ranks
from smartmops.runs.folder import PATHS, Run
from smartmops.runs.progress import Phases
from smartmops.settings.writing import NAME
from smartmops.states.answer_states import AnswerStates
from smartmops.tokens.batches import Encoded

# What a run folder holds before the first step of training: what the run is, a base pruned for it, the untrained gate.
BEFORE_TRAINING = {"config.json", NAME, "inputs.json", "checkpoints", "base", "gates.json"}


@contextmanager
def begun(command: str, config: Any, method: str, **seeds: Any) -> Iterator[Run]:
    """The run folder of a command, whose options are checked, and which nobody else writes meanwhile.

    Where the user has to mend something before anything was trained, what was written is taken away again: the mended
    command is another run, which the folder would refuse.

    Raises:
        BlockingIOError: another process writes `out`.
        FileExistsError: `out` holds a run already and `resume` is off.
        FileNotFoundError: `resume` is on and there is no `out`.
        ValueError: options do not fit, or with `resume` are others than at the start.
    """
    ranks.first_does(check, config)
    about = {"command": command, "arguments": asdict(config), **seeds, "base": config.model, "data": config.data,
             "method": method, PATHS: _paths([config.model, config.embedder], names_of(config.data))}  # fmt: skip
    with ExitStack() as held:
        ranks.first_does(held.enter_context, alone(config.out))
        new = not held_by(config.out)
        run = ranks.first_does(Run.create, config.out, about, config.resume)
        try:
            with translated(config):  # memory that is not enough is something to mend, too
                yield run
        except SmartmopsError as error:
            if new and ranks.rank() == 0 and not isinstance(error, DiskError):  # which says --resume
                _taken_away(run)
            raise


def _paths(models: Iterable[str | None], data: Iterable[str]) -> list[str]:
    """Those names that are files or folders; `~` stands for a home in those of models alone."""
    named = [name for name in models if name is not None and expanded(name).exists()]
    return named + [name for name in data if Path(name).exists()]


def _taken_away(run: Run) -> None:
    """Empty a run folder that holds what is written before training, and nothing else."""
    held = held_by(run.path)
    if set(held) <= BEFORE_TRAINING and not any(run.checkpoints.iterdir()):
        for item in (run.path / name for name in held):
            shutil.rmtree(item) if item.is_dir() else item.unlink()


def opened(config: Tasked, base: Any = None, tokenizer: Any = None) -> tuple[Task, Tasked]:
    """A base, opened unless given, beside its data, with recovery prompts where the method takes some.

    Returns:
        Both, and the options with the number of experts that the data settle.
    """
    task = Task.load(config, base, tokenizer)
    check_tasks(config, task.train_examples)
    settled = counted(config, task.train_examples)
    if config.experts is None and config.traits.reads:
        console.print(f"--experts {settled.experts}, by the tasks of the data")
    return recovered(task, settled), settled


@dataclass
class Frozen:
    """What the bare base does."""

    test: Evaluation
    validation: Evaluation | None  # None: nothing is held out

    @classmethod
    def of(cls, task: Task, model: Any, whole: bool) -> Frozen:
        """From states, which a closed adapter leaves as they are, or from `whole` passes."""
        look = partial(measured, task, model, progress=True, whole=whole)
        return cls(look(task.test), look(task.validation) if task.validation else None)


@dataclass
class Adapted:
    """A fresh adapter, prepared, on the base of a task.

    Attributes:
        task: Whose rows say which expert to use, where the method is told.
        names: What each expert is meant for; empty for a method that is not ours.
        accuracy: Of the gate, before training; None: it was not taught.
        shared: Whether the states that training needs are those of the bare base, so that both are measured from them.
    """

    task: Task
    model: Any
    names: list[str]
    accuracy: float | None
    shared: bool

    def measured(self, rows: Sequence[Encoded]) -> Evaluation:
        """Perplexity of rows."""
        return measured(self.task, self.model, rows, progress=True, whole=not self.shared)


def adapted(
    task: Task, config: TaskConfig, frozen: Frozen | None = None, phases: Phases | None = None
) -> tuple[Adapted, Frozen]:
    """A fresh adapter of the method, and what the bare base does, unless that is known."""
    phases = phases or Phases(shown=False)
    shared = config.traits.ours and not config.traits.told and task.recovery is None and ranks.world() == 1
    if frozen is None and not shared:
        with phases("evaluate"):
            frozen = Frozen.of(task, task.base, whole=True)
    with phases("prepare"):
        task = told(task, config, config.seed)
        made = Adapted(task, *adapt(task, config, config, config.seed), shared)
    if frozen is None:
        with phases("evaluate"), gating.closed(made.model):
            frozen = Frozen.of(task, made.model, whole=False)
    return made, frozen


def fitted(
    made: Adapted, config: TrainConfig, folder: Path, write: Callable[[dict[str, Any]], None],
    marks: Evaluation | None, checkpoint: Path | None = None, halfway: Callable[[], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train the adapter and keep the best state, or the base where `marks`, its validation, is better than all.

    Returns:
        What validation says, as `metrics.json` holds it; empty without `marks`.
    """
    task, model = made.task, made.model
    start = state_of(model)
    look = partial(measured, task, model, task.validation) if marks else None
    schedule = replace(config, eval_every=spacing(config, len(task.validation), ranks.world()))
    rows, collate = task.feed(model)
    seen = config.steps * config.batch_size * ranks.world()
    if isinstance(collate, AnswerStates) and ranks.world() > 1 and seen >= len(rows):
        collate.together()
    kept: Kept = fit(model, config, schedule, rows, collate, folder, write, look, checkpoint, halfway)
    return settle(model, kept, start, marks.overall, len(task.validation)) if marks else {}


def shown(run: Run, task: Task, model: Any, config: Any) -> None:
    """Sample answers of the frozen and the adapted model, where the method can answer."""
    if task.embedder is None and config.traits.answers and config.samples_per_task:
        run.write_samples(samples(model, task.tokenizer, task.test_examples, config.samples_per_task, task.template))
