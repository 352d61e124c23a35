"""What the command line can do, as functions: options by name or as a config, results returned. Prints no tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

from smartmops.checks.errors import UnknownOption, WrongType
from smartmops.checks.folders import as_path
from smartmops.checks.limits import Options, check_named, hints_of, named_in_python
from smartmops.checks.resources import translated
from smartmops.options.compression import CompressConfig
from smartmops.options.federation import FederateConfig
from smartmops.options.finished.handover import ExportConfig, PushConfig
from smartmops.options.finished.reading import DataConfig, EvaluateConfig, InspectConfig
from smartmops.options.finished.surgery import (
    AddConfig,
    AdviseConfig,
    CalibrateConfig,
    Change,
    DropConfig,
    ExpertsConfig,
    FreezeConfig,
    ListConfig,
    MergeConfig,
    RenameConfig,
)
from smartmops.options.training import CompareConfig, TrainConfig
from smartmops.settings.reading import options_of

if TYPE_CHECKING:
    from smartmops.analysis.finished import LoadedRun

C = TypeVar("C", bound=Options)


def train(config: TrainConfig | str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Adapt a frozen model to a data set and write a run folder.

    Args:
        config: Everything `smartmops train` takes, or a YAML file of options such as a run's `config.yaml`.
        **options: The same by name, in place of a config: `train(model="smollm2", data="yours.jsonl", out="run")`.
            Beside a file, they count for more than what stands in it.

    Returns:
        What `metrics.json` holds: `perplexity`, `perplexity_frozen` {`overall`, `per_task`} and more.

    Raises:
        ConfigError, DataError, BaseModelError: options, data or base do not fit; one line for each fault, with value,
            limit and way out.
        RunExists: `out` holds a run already and `resume` is off.
        ResourceError: memory or disk space was not enough.
    """
    return _run("flow.trainer", "train", _made(TrainConfig, config, options))


def compare(config: CompareConfig | str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Evaluate the frozen base, train each method under each seed, write a run folder.

    Returns:
        What `metrics.json` holds: `perplexity` {method: mean over seeds} and `per_task` {method: {task: value}}.

    Raises:
        SmartmopsError: as `train`.
    """
    return _run("flow.compare", "compare", _made(CompareConfig, config, options))


def federate(config: FederateConfig | str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Train one adapter over clients whose data stay with them, and write a run folder.

    Returns:
        What `metrics.json` holds: as `train`, and `rounds`, a list.

    Raises:
        SmartmopsError: as `train`.
        QuorumLost: too few clients answered, again and again.
    """
    made = _made(FederateConfig, config, options)
    simulated = made.engine == "flower-simulation"
    return _run(*(("flower.simulation", "simulate") if simulated else ("federated.federate", "federate")), made)


def compress(config: CompressConfig | str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Prune a model, quantise it, or both, into a folder that transformers loads.

    Returns:
        `sparsity`, `perplexity_before`, `perplexity_after`, `bytes_before`, `bytes_after` and `seconds`.

    Raises:
        SmartmopsError: as `train`.
    """
    return _run("compression.compress", "compress", _made(CompressConfig, config, options))


def evaluate(config: EvaluateConfig | str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Perplexity of a finished run over response tokens, on its test split or other data.

    Returns:
        `perplexity` {`overall`, `per_task`}; also `answers` where some are asked for.

    Raises:
        SmartmopsError: there is no such run, or the data do not fit.
    """
    return _run("analysis.finished", "evaluate", _made(EvaluateConfig, config, options))


def inspect(config: InspectConfig | str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Which experts a run's gate chooses for an instruction, and both models' answers.

    Returns:
        `gate` {expert: weight}, `left_to_base`, `frozen` and `adapted`.

    Raises:
        SmartmopsError: there is no such run, or its method has no gate.
    """
    return _run("analysis.finished", "inspect", _made(InspectConfig, config, options))


def preview(config: DataConfig | str | Path | None = None, **options: Any) -> dict[str, Any]:
    """What `train` would read of DATA: counts, lengths in tokens, what is cut, what stands twice, examples.

    Returns:
        As `smartmops.analysis.preview.preview`.

    Raises:
        DataError, BaseModelError: data or tokenizer cannot be read.
    """
    return _run("analysis.preview", "preview", _made(DataConfig, config, options))


def export(config: ExportConfig | str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Write a run's experts, or its gate, in a form that other programs load.

    Returns:
        How far what was written is from the run; the same is in `export.json`.

    Raises:
        ValueError: there is no such run, or it cannot be carried in that form.
        ImportError: a package is missing; the message has its `pip install` line.
    """
    return _run("handover.export", "export", _made(ExportConfig, config, options))


def push(config: PushConfig | str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Put a run's adapter, its template and its card into a repository of the hub.

    Returns:
        `repo`, `files` {name: bytes} and `url` (None with `dry_run`, which sends nothing).

    Raises:
        OSError: the hub cannot be reached, or does not let us write.
        ValueError: there is no such run.
    """
    return _run("handover.hub", "push", _made(PushConfig, config, options))


def list_experts(run: str | Path, config: ListConfig | str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Each expert of a run: tasks, usage, nearest neighbours, cost of dropping it.

    Args:
        run: Run folder.
        config: Everything `smartmops experts RUN list` takes.
        **options: The same by name.

    Returns:
        As `smartmops.surgery.change.listed`.

    Raises:
        ValueError: there is no such run, or it has no experts that can be told apart.
    """
    return _changed("change", "listed", run, _made(ListConfig, config, options))


def add_expert(run: str | Path, config: AddConfig | str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Add one expert to a run: trained on `data`, moved from another run (`source`), or made of a written `prompt`.

    Returns:
        As `smartmops.surgery.add.add`.

    Raises:
        ValueError, FileExistsError: as `train`.
    """
    return _changed("add", "add", run, _made(AddConfig, config, options))


def drop_expert(run: str | Path, config: DropConfig | str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Take the expert `name` out of a run; returns what it cost, and where its instructions go."""
    return _changed("change", "drop", run, _made(DropConfig, config, options))


def merge_experts(run: str | Path, config: MergeConfig | str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Put one expert in the place of `first` and `second`; returns perplexity before and after."""
    return _changed("change", "merge", run, _made(MergeConfig, config, options))


def rename_expert(run: str | Path, config: RenameConfig | str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Call the expert `name` `to`; returns all names."""
    return _changed("change", "rename", run, _made(RenameConfig, config, options))


def freeze_expert(run: str | Path, config: FreezeConfig | str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Let further training leave the expert `name` as it is, or with `off` train it again; returns the frozen ones."""
    return _changed("change", "freeze", run, _made(FreezeConfig, config, options))


def calibrate(run: str | Path, config: CalibrateConfig | str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Set what is left to the base from texts (`unrelated`) that should be; returns shares before and after."""
    return _changed("change", "calibrate", run, _made(CalibrateConfig, config, options))


def advise(config: AdviseConfig | str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Whether a new task needs an expert of its own: how the gate sees it, perplexity, a short trial.

    Returns:
        As `smartmops.surgery.add.advise`: `advice`, one sentence, and its numbers.

    Raises:
        ValueError: there is no such run, or the data cannot be read.
    """
    return _run("surgery.add", "advise", _made(AdviseConfig, config, options))


def load_run(path: str | Path) -> LoadedRun:
    """A finished run, loaded once: it answers, says which experts fire, and is measured.

    Raises:
        RunNotFound: there is no finished run.
        AdapterError: its adapter is damaged, or belongs to another base.
    """
    finished = import_module("smartmops.analysis.finished")
    found: LoadedRun = finished.LoadedRun.open(as_path("path", path, "a run folder"))
    return found


def _changed(module: str, name: str, run: str | Path, change: Change) -> dict[str, Any]:
    """A change of a run's experts, once it is known that it can be made."""
    config = ExpertsConfig(run=as_path("run", run, "a run folder"), do=change)
    check_named(config)
    return _run(f"surgery.{module}", name, config, config.run, config.do)


def _made(kind: type[C], config: C | str | Path | None, options: dict[str, Any]) -> C:
    """The config, checked.

    Raises:
        UnknownOption: a config and options, or an option that is unknown or missing.
        WrongType: what is given for a config is none.
        ConfigError: a value is outside its limits, or the file cannot be read.
    """
    file: dict[str, Any] = {}
    if isinstance(config, str | Path):
        file, config = options_of(as_path("config", config, "a YAML file of options"), kind), None
    if config is not None and not isinstance(config, kind):
        raise WrongType(f"config={str(config)[:40]!r} is no {kind.__name__}: give one, a YAML file of options, or "
                        "options by name")  # fmt: skip
    if config is not None and options:
        raise UnknownOption(f"a config and {', '.join(options)}: give one or the other")
    if config is None:
        config = kind(**_complete(kind, file | options))
        config.from_file = {name: value for name, value in file.items() if name not in options}  # type: ignore[misc]
    check_named(config)
    return config


def _complete(kind: type, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a config, all known and none missing."""
    known = {each.name: each for each in fields(kind)}
    if unknown := [name for name in options if name not in known]:
        raise UnknownOption(f"{unknown[0]!r} is no option of {kind.__name__}{_near(unknown[0], {*known})}")
    needed = [name for name, each in known.items() if each.default is MISSING and each.default_factory is MISSING]
    if missing := [name for name in needed if name not in options]:
        raise UnknownOption(f"{kind.__name__} needs {' and '.join(missing)}: give {missing[0]}=...")
    return {name: _meant(kind, name, value) for name, value in options.items()}


def _meant(kind: type, name: str, value: Any) -> Any:
    """A string where a path is meant is one, and so is a list where several values are meant."""
    if isinstance(value, list) and _is_several(hints_of(kind)[name]):
        return tuple(value)
    return Path(value) if isinstance(value, str) and value.strip() and _is_path(hints_of(kind)[name]) else value


def _is_path(hint: Any) -> bool:
    return hint is Path or any(_is_path(each) for each in get_args(hint) if each is not str)


def _is_several(hint: Any) -> bool:
    return get_origin(hint) is tuple or any(_is_several(each) for each in get_args(hint))


def _near(name: str, names: set[str]) -> str:
    from difflib import get_close_matches

    found = get_close_matches(name, names, 1)
    return f": {found[0]!r} is meant, perhaps" if found else f": choose from {', '.join(sorted(names))}"


def _run(module: str, name: str, config: Options, *given: Any) -> dict[str, Any]:
    """The function behind a command, imported now: it brings torch along. It takes `given`, or else the config."""
    early = import_module("smartmops.reading.early")
    run: Callable[..., dict[str, Any]] = getattr(import_module(f"smartmops.{module}"), name)
    with named_in_python(config), translated(config):
        early.look_at(config)
        return run(*(given or (config,)))
