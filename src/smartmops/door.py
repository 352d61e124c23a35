"""What the command line can do, as functions: options by name or as a config, results returned. Prints no tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from smartmops.checks.limits import Options, check_named, hints_of, in_python
from smartmops.options.compression import CompressConfig
from smartmops.options.federation import FederateConfig
from smartmops.options.finished.reading import DataConfig, EvaluateConfig, InspectConfig
from smartmops.options.training import CompareConfig, TrainConfig

if TYPE_CHECKING:
    from smartmops.analysis.finished import LoadedRun

C = TypeVar("C", bound=Options)


def train(config: TrainConfig | None = None, **options: Any) -> dict[str, Any]:
    """Adapt a frozen model to a data set and write a run folder.

    Args:
        config: Everything `smartmops train` takes.
        **options: The same by name, in place of a config: `train(model="smollm2", data="yours.jsonl", out="run")`.

    Returns:
        What `metrics.json` holds: `perplexity`, `perplexity_frozen` {`overall`, `per_task`} and more.

    Raises:
        ValueError: options, data or base do not fit; one line for each, with value, limit and way out.
        FileExistsError: `out` holds a run already and `resume` is off.
    """
    return _run("flow.trainer", "train", _made(TrainConfig, config, options))


def compare(config: CompareConfig | None = None, **options: Any) -> dict[str, Any]:
    """Evaluate the frozen base, train each method under each seed, write a run folder.

    Returns:
        What `metrics.json` holds: `perplexity` {method: mean over seeds} and `per_task` {method: {task: value}}.

    Raises:
        ValueError, FileExistsError: as `train`.
    """
    return _run("flow.compare", "compare", _made(CompareConfig, config, options))


def federate(config: FederateConfig | None = None, **options: Any) -> dict[str, Any]:
    """Train one adapter over clients whose data stay with them, and write a run folder.

    Returns:
        What `metrics.json` holds: as `train`, and `rounds`, a list.

    Raises:
        ValueError, FileExistsError: as `train`.
        QuorumLost: too few clients answered, again and again.
    """
    made = _made(FederateConfig, config, options)
    simulated = made.engine == "flower-simulation"
    return _run(*(("flower.simulation", "simulate") if simulated else ("federated.federate", "federate")), made)


def compress(config: CompressConfig | None = None, **options: Any) -> dict[str, Any]:
    """Prune a model, quantise it, or both, into a folder that transformers loads.

    Returns:
        `sparsity`, `perplexity_before`, `perplexity_after`, `bytes_before`, `bytes_after` and `seconds`.

    Raises:
        ValueError, FileExistsError: as `train`.
    """
    return _run("compression.compress", "compress", _made(CompressConfig, config, options))


def evaluate(config: EvaluateConfig | None = None, **options: Any) -> dict[str, Any]:
    """Perplexity of a finished run over response tokens, on its test split or other data.

    Returns:
        `perplexity` {`overall`, `per_task`}; also `answers` where some are asked for.

    Raises:
        ValueError: there is no such run, or the data do not fit.
    """
    return _run("analysis.finished", "evaluate", _made(EvaluateConfig, config, options))


def inspect(config: InspectConfig | None = None, **options: Any) -> dict[str, Any]:
    """Which experts a run's gate chooses for an instruction, and both models' answers.

    Returns:
        `gate` {expert: weight}, `left_to_base`, `frozen` and `adapted`.

    Raises:
        ValueError: there is no such run, or its method has no gate.
    """
    return _run("analysis.finished", "inspect", _made(InspectConfig, config, options))


def preview(config: DataConfig | None = None, **options: Any) -> dict[str, Any]:
    """What `train` would read of DATA: counts, lengths in tokens, what is cut, what stands twice, examples.

    Returns:
        As `smartmops.analysis.preview.preview`.

    Raises:
        ValueError: the data cannot be read.
    """
    return _run("analysis.preview", "preview", _made(DataConfig, config, options))


def load_run(path: str | Path) -> LoadedRun:
    """A finished run, loaded once: it answers, says which experts fire, and is measured.

    Raises:
        FileNotFoundError: there is no finished run.
        ValueError: its adapter is damaged, or belongs to another base.
    """
    finished = import_module("smartmops.analysis.finished")
    found: LoadedRun = finished.LoadedRun.open(Path(path))
    return found


def _made(kind: type[C], config: C | None, options: dict[str, Any]) -> C:
    """The config, checked.

    Raises:
        TypeError: a config and options, or an option that is unknown or missing.
        ValueError: a value is outside its limits.
    """
    if config is not None and options:
        raise TypeError(f"a config and {', '.join(options)}: give one or the other")
    if config is None:
        names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
        if unknown := [name for name in options if name not in names]:
            raise TypeError(f"{unknown[0]!r} is no option of {kind.__name__}{_near(unknown[0], names)}")
        config = kind(**{name: _as_path(kind, name, value) for name, value in options.items()})
    check_named(config)
    return config


def _as_path(kind: type, name: str, value: Any) -> Any:
    """A string where a path is meant is one."""
    return Path(value) if isinstance(value, str) and _is_path(hints_of(kind)[name]) else value


def _is_path(hint: Any) -> bool:
    return hint is Path or any(_is_path(each) for each in get_args(hint) if each is not str)


def _near(name: str, names: set[str]) -> str:
    from difflib import get_close_matches

    found = get_close_matches(name, names, 1)
    return f": {found[0]!r} is meant, perhaps" if found else f": choose from {', '.join(sorted(names))}"


def _run(module: str, name: str, config: Options) -> dict[str, Any]:
    """The function behind a command, imported now: it brings torch along."""
    early = import_module("smartmops.flow.early")
    run: Callable[[Options], dict[str, Any]] = getattr(import_module(f"smartmops.{module}"), name)
    try:
        early.look_at(config)
    except ValueError as error:
        raise ValueError(in_python(str(error))) from None
    return run(config)
