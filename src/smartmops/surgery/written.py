"""A changed run, written: beside the old one, or whole in its place. Measures nothing but the gate."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from smartmops.base.names import shown_name
from smartmops.checks.folders import MARK, before, fresh_beside, half_written, refused, whole
from smartmops.checks.lock import alone
from smartmops.data.several import Names, names_of
from smartmops.evaluation.measure import mean_weights
from smartmops.options.training import VALIDATION_PART
from smartmops.reading.task import Task
from smartmops.rows.example import of_examples
from smartmops.runs.card import keep, number
from smartmops.runs.folder import MEASURED, Run

from .adapter.parts import Parts, put, taken
from .subject import ADDED, Subject, parts_names

ANSWERS = ("gates.json", "samples.jsonl", "evaluation.json")  # of a run's files, those that say what it answers
KEPT = ("base", "curves.jsonl", "samples.jsonl")  # of them, those that a changed run has as they were
STALE = ("perplexity", "perplexity_frozen", "tokens", "best", "answers", "gate", "interference", "examples", "suites",
         "trainable_parameters", "measured_on", "per_task", "per_seed", "seeds", "validation")  # numbers  # fmt: skip


@dataclass(frozen=True)
class Change:
    """What was done to a run.

    Attributes:
        command: That did it.
        said: What is told of it.
        metrics: Perplexities of `Subject.held`'s rows, as `metrics.json` holds them; None: those of before hold still.
        trained_on: What an expert was trained on beside the run's own data, as `trained_on` returns it.
    """

    command: str
    said: Mapping[str, Any]
    metrics: Mapping[str, Any] | None = None
    trained_on: Mapping[str, Any] | None = None


def write(subject: Subject, parts: Parts, out: Path | None, change: Change) -> Path:
    """Write a run with another adapter into `out`, or (None) in its own place, whose other files stay.

    Returns:
        Where it is.
    """
    target = out or subject.run.path
    if out is not None and (error := refused(out, False, resumes=False)) is not None:
        raise error
    put(subject.model, parts)
    stale = (ADDED, *(() if change.metrics is None else ANSWERS))
    if out is not None:
        with alone(target), whole(target) as place:
            _fill(subject, place, target.name, change)
            _copy(subject.run.path, place, stale)
        return target
    with alone(target):
        place = fresh_beside(target, target.parent)
        try:
            _fill(subject, place, target.name, change)
            _carry(target, place, stale)
            _swap(place, target)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
    return target


def _fill(subject: Subject, place: Path, name: str, change: Change) -> None:
    """A folder with the changed run, which will be called `name`."""
    was, names = subject.run, parts_names(subject.model)
    config = {name: value for name, value in was.config.items() if name != "versions"}
    config["arguments"] = config["arguments"] | {"out": name}
    entry = {"command": change.command, "run": was.path.name, "trained_on": change.trained_on}
    run = Run.create(place, config | {"changed": [*was.config.get("changed", []), entry]})
    if inputs := was.read_inputs():
        run.same_inputs(inputs if change.metrics is None else _inputs(subject, inputs))
    _write_gates(subject, run, change.metrics is not None)
    if read := {name: each.contiguous() for name, each in subject.added.items() if name in names}:
        save_file(read, place / ADDED)
    keep(run, subject.model, subject.template)
    found = _metrics(subject, change)
    number(run, subject.template, found)
    run.write_metrics(found)


def _metrics(subject: Subject, change: Change) -> dict[str, Any]:
    """What `metrics.json` says from now on: `added` are experts that came later, as they were measured then."""
    names, kept = parts_names(subject.model), subject.run.read_metrics()
    added = dict(kept.pop("added", {}))
    if change.metrics is None:
        now = dict(zip(subject.parts.names, names, strict=True))
        added = {now.get(name, name): each for name, each in added.items()}
        if "gate" in kept:
            kept["gate"] = {task: each | {"nearest": now.get(each["nearest"], each["nearest"])}
                            for task, each in kept["gate"].items()}  # fmt: skip
    else:
        kept = {name: value for name, value in kept.items() if name not in STALE} | dict(change.metrics)
        kept["gained"] = kept["perplexity"]["overall"] < kept["perplexity_frozen"]["overall"]
        if what := _measured_on(subject):
            kept["measured_on"] = what
        if "frozen" in change.said.get("new", {}):
            added[change.said["name"]] = dict(change.said["new"])
    if added := {name: each for name, each in added.items() if name in names}:
        kept["added"] = added
    return kept | {"experts": names, "change": dict(change.said)}


def _is_part(subject: Subject) -> bool:
    """Whether perplexities are of other rows than all that the run was tested on."""
    return subject.old is not None or len(subject.held()) < len(subject.known().test)


def _measured_on(subject: Subject) -> str:
    """What perplexities are of, where that is not the whole of the run's test split; else empty."""
    count, validated = len(subject.held()), subject.run.config["arguments"].get("validation")
    if subject.old is not None:
        return f"{count} examples of {' '.join(map(shown_name, names_of(subject.old)))}"
    if not _is_part(subject):
        return VALIDATION_PART if validated else ""
    whole_of = VALIDATION_PART if validated else "the run's test split"
    return f"{count} of the {len(subject.known().test)} examples of {whole_of}"


def trained_on(data: Names, columns: Sequence[str], share: float, seed: int, task: Task) -> dict[str, Any]:
    """Data that an expert was trained on beside the run's own: how they are read and split again, and what they are."""
    return {"data": list(names_of(data)), "columns": list(columns), "test_share": share, "seed": seed,
            "test": task.test_split}  # fmt: skip


def _inputs(subject: Subject, inputs: Mapping[str, str]) -> dict[str, str]:
    """Fingerprints of what a changed run is made of, and of what it was measured on."""
    found = {name: each for name, each in inputs.items() if name != MEASURED}
    rows = [tuple(row.input_ids) for row in subject.held()]
    return found | ({MEASURED: of_examples(rows)} if _is_part(subject) else {})


def _write_gates(subject: Subject, run: Run, changed: bool) -> None:
    """What the gate does now with the run's own data; where it does what it did, what it did, by its names now."""
    names, former = parts_names(subject.model), subject.run.read_gates()
    if not changed and former is not None:
        run.write_gates(former | {"experts": names})
    elif changed and subject.own is not None:
        rows = subject.held()
        after = mean_weights(rows, subject.weights(rows, "test", taken(subject.model)).gate)
        run.write_gates({"experts": names, "after": after, "left_to_base": True})


def _copy(former: Path, fresh: Path, stale: Sequence[str]) -> None:
    """Give a new run what of the former one holds still."""
    for item in (former / name for name in KEPT if name not in stale):
        if item.is_dir():
            shutil.copytree(item, fresh / item.name, symlinks=True)
        elif item.is_file():
            shutil.copy2(item, fresh / item.name)


def _carry(former: Path, fresh: Path, stale: Sequence[str]) -> None:
    """Give a folder what else lies in the one whose place it takes, by links: until then, both have it."""
    for item in former.iterdir():
        there = fresh / item.name
        if item.name in stale or half_written(item) or (there.exists() and not _empty(there)):
            continue
        if item.name == MARK:  # held by whoever changes the run, and so is the folder that takes its place
            with suppress(OSError, NotImplementedError):
                os.link(item, there)
        elif item.is_dir() and not item.is_symlink():
            shutil.copytree(item, there, symlinks=True, copy_function=_link, dirs_exist_ok=True)
        else:
            _link(item, there)


def _empty(place: Path) -> bool:
    return place.is_dir() and not any(place.iterdir())


def _link(source: str | Path, target: str | Path) -> None:
    """A file, or a link, under a second name; a copy where there is no such thing."""
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)


def _swap(fresh: Path, target: Path) -> None:
    """Put a folder in the place of another; whoever is stopped between the two renames finds both beside it."""
    former = before(target)
    shutil.rmtree(former, ignore_errors=True)
    os.rename(target, former)
    try:
        os.rename(fresh, target)
    except BaseException:
        with suppress(OSError):
            os.rename(former, target)
        raise
    shutil.rmtree(former, ignore_errors=True)
