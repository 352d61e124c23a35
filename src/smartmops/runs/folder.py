"""Run folders: the one place that writes them, and the reader that every later room uses.

Knows files, atomicity and the words of an error. Knows no model, no tokens, and nothing of what the numbers mean.

A run folder holds `config.json` (written first), `config.yaml` (its options, as `--config` reads them), `inputs.json`,
`curves.jsonl` (grows), `gates.json`, `samples.jsonl`, `adapter/`, `checkpoints/` and `metrics.json`, which is written
last: a run that has it is finished. Every file but the growing one appears whole or not at all. One process writes a
folder: under several ranks, the first.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from smartmops.checks.errors import AdapterError, AdapterNotFound, RunError, RunNotFound, SmartmopsError
from smartmops.checks.folders import UNFINISHED, half_written, held_by, refused, replacing
from smartmops.settings.writing import KINDS, NAME, resolved, versions

PATHS = "paths"  # of config.json: which of the names of base, data and embedder were files or folders at the start
# A moved folder, a newer library or another tracker is the same run.
MAY_DIFFER = ("versions", PATHS, "arguments.out", "arguments.resume", "arguments.report_to")
TEST_SPLIT = "test split"  # of the fingerprints in inputs.json, that of the test examples as they were drawn
MEASURED = "part that was measured"  # of these fingerprints, that of its rows where it is not the whole test split
CLIENT_FILES = "set of clients' files"  # of these fingerprints, that of a federation's, as they were read
_REPLACED = ".adapter.replaced"  # the former adapter, for the instant between the two renames of a swap


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` whole or not at all."""
    # In JSON, a backslash escape is exactly how half a surrogate pair is spelled: no text can fail to be stored.
    with replacing(path) as fresh, open(fresh, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.write(text)


def check_adapter(path: Path) -> None:
    """Check that a local adapter folder can be loaded: both files present, JSON valid, tensor file whole.

    Reads the tensor file's header only, so it costs milliseconds at any size.

    Raises:
        AdapterNotFound: The folder or one of its two files is missing.
        AdapterError: `adapter_config.json` is no JSON object, or `adapter_model.safetensors` is damaged or cut short.
    """
    path = Path(path)
    tensors = path / "adapter_model.safetensors"
    for file in (path / "adapter_config.json", tensors):
        if not file.is_file():
            pickled = file is tensors and (path / "adapter_model.bin").exists()
            hint = " (adapter_model.bin is a pickle, which is never read)" if pickled else ""
            raise AdapterNotFound(
                f"{path} is not an adapter folder, it has no {file.name}{hint}: give a folder written by `smartmops "
                f"train` (RUN/adapter) or by save_pretrained"
            )
    _read_object(path / "adapter_config.json", AdapterError)
    try:
        with safe_open(tensors, framework="numpy") as opened:
            empty = not list(opened.keys())
    except SafetensorError as error:
        raise AdapterError(
            f"{tensors} is damaged or cut short ({tensors.stat().st_size} bytes; {error}): copy it again from where it "
            f"was saved, or resume the run that wrote it"
        ) from error
    if empty:
        raise AdapterError(f"{tensors} holds no tensors: save the adapter again")


@dataclass(frozen=True)
class Run:
    """One run folder. `Run.create` for the one who writes it, `Run.open` for those who read it.

    Attributes:
        path: The folder.
        config: What `config.json` holds: `command`, `arguments`, `seed` or `seeds`, `versions`, and so on.
    """

    path: Path
    config: dict[str, Any]

    @classmethod
    def create(cls, path: Path | str, config: Mapping[str, Any], resume: bool = False) -> Run:
        """Start a run in a new or empty folder, or take one up again.

        `versions` is added to `config`, and `seeds` (a list) where only `seed` is given. With `resume`, an empty folder
        starts afresh, since a kill may leave one; one that is not there is refused, since its name may be mistyped.
        The caller looks at `finished` and, once it knows the checkpoint, calls `rewind`. Changed versions are warned
        about.

        Raises:
            RunExists: The folder holds something and `resume` is off, or holds something that is no run.
            RunNotFound: `resume` is on and there is no such folder.
            NotAFolder: `path` is a file.
            RunError: `config` names no seed, or differs from the stored one in a key that decides the numbers.
        """
        path = Path(path)
        if "seed" not in config and "seeds" not in config:
            raise ValueError("the run's config names no seed, so it could not be repeated: give it `seed` or `seeds`")
        asked = _plain({**config, "versions": versions(), "seeds": config.get("seeds", [config.get("seed")])})
        if (error := refused(path, resume)) is not None:
            raise error
        return cls._take_up(path, asked) if held_by(path) else cls._start(path, asked)

    @classmethod
    def _start(cls, path: Path, config: dict[str, Any]) -> Run:
        path.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        write_text(path / "config.json", _dump(config))
        _write_options(path, config)
        (path / "checkpoints").mkdir(exist_ok=True)
        return cls(path, config)

    @classmethod
    def _take_up(cls, path: Path, asked: dict[str, Any]) -> Run:
        stored = _read_object(path / "config.json")
        if done := stored.get("changed"):
            raise RunError(f"--resume: {path} was finished and then changed by `{done[-1]['command']}`, so it cannot be "
                           "trained further: choose another folder with --out")  # fmt: skip
        for key, then, now in _differences(stored, asked):
            if key not in MAY_DIFFER and not key.startswith("versions."):
                raise RunError(
                    f"--resume: {path} was started with {key}={_show(then)}, but now {key}={_show(now)} is asked for: "
                    f"ask for {_show(then)} again, or choose another folder with --out"
                )
        changed = [f"{k} {then} -> {now}" for k, then, now in _differences(stored, asked) if k.startswith("versions.")]
        if changed:
            warnings.warn(
                f"{path} was started with other versions ({', '.join(changed)}): the resumed run need not equal an "
                f"uninterrupted one bit for bit",
                stacklevel=3,
            )
        run = cls(path, stored)
        if (path / _REPLACED).exists() and not run.adapter_dir.exists():
            os.rename(path / _REPLACED, run.adapter_dir)
        _sweep(path)
        _write_options(path, stored)
        (path / "checkpoints").mkdir(exist_ok=True)
        if (path / "curves.jsonl").exists():
            run._write_rows("curves.jsonl", run.read_curves())  # a torn last line must go before the next is appended
        return run

    @classmethod
    def open(cls, path: Path | str, *, unfinished: bool = False) -> Run:
        """Open a run to read it; `unfinished` admits one without `metrics.json`.

        Raises:
            RunNotFound: There is no such folder, it is no run folder, or it is unfinished.
            RunNotFound: `config.json` or `metrics.json` is not valid JSON; the message names the file and line.
        """
        path = Path(path)
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise RunNotFound(f"{path} {what}: give a run folder, as written by --out")
        if not (path / "config.json").is_file():
            raise RunNotFound(
                f"{path} has no config.json, so it is no run folder: give a folder written by --out"
            )
        run = cls(path, _read_object(path / "config.json"))
        if run.finished:
            run.read_metrics()  # broken JSON is found here, not halfway through a report
        elif not unfinished:
            raise RunNotFound(
                f"{path} is unfinished, it has no metrics.json (last logged step: {run.last_step()}): finish it with "
                f"--resume, or give a finished run"
            )
        return run

    # ------------------------------------------------------------------------------------------------------ places
    @property
    def finished(self) -> bool:
        """Whether `metrics.json`, which is written last, is there."""
        return (self.path / "metrics.json").is_file()

    @property
    def adapter_dir(self) -> Path:
        """Where the adapter is, or will be after `save_adapter`."""
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        """Folder of the trainer's own checkpoints, which a resumed run starts from."""
        return self.path / "checkpoints"

    # ------------------------------------------------------------------------------------------------------ writing
    def append_curve(self, row: Mapping[str, Any], **labels: Any) -> None:
        """Append one logged row (`step`, and `loss` in nats per response token or `eval_perplexity`, ...) with labels.

        Raises:
            RunError: The row has no `step`.
        """
        if "step" not in row:
            raise ValueError(f"a row of curves.jsonl needs a step, this one has only {sorted(row)}")
        with open(self.path / "curves.jsonl", "a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(_line({**labels, **row}))

    def rewind(self, step: int, **labels: Any) -> None:
        """Discard logged rows past `step` (optimiser steps), which a resumed run is about to log again.

        With labels, only rows that carry all of them are discarded: `rewind(200, method="mops", seed=1)`.
        """
        rows = self.read_curves()
        if rows:
            gone = [row.get("step", 0) > step and all(row.get(k) == v for k, v in labels.items()) for row in rows]
            self._write_rows("curves.jsonl", [row for row, past in zip(rows, gone, strict=True) if not past])

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write every number the command printed. This finishes the run, so it comes last."""
        write_text(self.path / "metrics.json", _dump(_plain(metrics)))

    def same_inputs(self, found: Mapping[str, str]) -> None:
        """Keep fingerprints of what the run is made of, by name; in a resumed run, compare them with those kept.

        Raises:
            RunError: they differ.
        """
        then = self.read_inputs()
        for name, now in found.items():
            if then.get(name, now) != now:
                raise RunError(
                    f"--resume: {self.path} was started with another {name} (fingerprint {then[name]}, now {now}): "
                    "give what it was started with, or choose another folder with --out"
                )
        if {**found, **then} != then:
            write_text(self.path / "inputs.json", _dump({**then, **found}))

    def other_inputs(self, found: Mapping[str, str]) -> list[str]:
        """Keep fingerprints by name as `same_inputs`, but put new ones for those that differ, and name these."""
        then = self.read_inputs()
        if {**then, **found} != then:
            write_text(self.path / "inputs.json", _dump({**then, **found}))
        return [name for name, now in found.items() if then.get(name, now) != now]

    def write_gates(self, gates: Mapping[str, Any]) -> None:
        """Write mean gate weights, as `report.gates.tables` takes them."""
        write_text(self.path / "gates.json", _dump(_plain(gates)))

    def write_evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Write the numbers of an evaluation made after the run, beside its own."""
        write_text(self.path / "evaluation.json", _dump(_plain(metrics)))

    def write_samples(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Write sample answers: rows of `category`, `instruction`, `context`, `reference`, `frozen`, `adapted`."""
        self._write_rows("samples.jsonl", samples)

    def save_adapter(self, save: Callable[[Path], object]) -> Path:
        """Let `save(folder)` write an adapter (`model.save_pretrained` does), check it, and swap it in.

        A reader sees the former adapter or the new one, never a mixture; a failing `save` leaves the former in place.

        Raises:
            AdapterNotFound: `save` did not write both adapter files.
            RunError: What it wrote cannot be read back.
        """
        beside, former = self.path / f".adapter.{os.getpid()}{UNFINISHED}", self.path / _REPLACED
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        try:
            save(beside)
            check_adapter(beside)
            for file in beside.rglob("*"):
                _sync(file)
            if self.adapter_dir.exists():
                shutil.rmtree(former, ignore_errors=True)
                os.rename(self.adapter_dir, former)  # killed here, `create(resume=True)` puts it back
            os.rename(beside, self.adapter_dir)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)
        return self.adapter_dir

    def _write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        write_text(self.path / name, "".join(_line(row) for row in rows))

    # ------------------------------------------------------------------------------------------------------ reading
    def read_metrics(self) -> dict[str, Any]:
        """`metrics.json`; empty while the run is unfinished."""
        return _read_object(self.path / "metrics.json") if self.finished else {}

    def lacks(self, name: str, place: Path) -> bool:
        """Whether `name`, which was a file or folder when the run began, is at `place` no more."""
        return name in self.config.get(PATHS, ()) and not place.exists()

    def read_inputs(self) -> dict[str, str]:
        """Fingerprints of what the run is made of, by name; empty where it kept none."""
        file = self.path / "inputs.json"
        return _read_object(file) if file.is_file() else {}

    def read_curves(self) -> list[dict[str, Any]]:
        """Logged rows in the order of logging; a last line torn by a kill is left out."""
        return list(_read_rows(self.path / "curves.jsonl"))

    def read_gates(self) -> dict[str, Any] | None:
        """`gates.json`, or None where the run has none (a method without a gate)."""
        file = self.path / "gates.json"
        return _read_object(file) if file.is_file() else None

    def read_samples(self) -> list[dict[str, Any]]:
        """Sample answers; empty where the run has none."""
        return list(_read_rows(self.path / "samples.jsonl"))

    def last_step(self) -> int | None:
        """Highest step logged so far (optimiser steps), or None."""
        return max((row.get("step", 0) for row in self.read_curves()), default=None)


# ---------------------------------------------------------------------------------------------------------- JSON
def _plain(value: Any) -> Any:
    """What JSON can say of `value`: paths as text, sequences as lists, and null for the NaN that JSON has not."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value))
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if callable(getattr(value, "tolist", None)):
        return _plain(value.tolist())  # a number or an array of NumPy or torch
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _dump(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n"


def _read_object(file: Path, kind: type[SmartmopsError] = RunError) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise kind(f"{file} is not valid JSON ({error}): restore it, or run the command again") from error
    if not isinstance(found, dict):
        raise kind(f"{file} holds {_show(found)}, not a JSON object: restore it, or run the command again")
    return found


def _read_rows(file: Path) -> Iterator[dict[str, Any]]:
    lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if not line.endswith(b"\n"):
                return  # torn by a kill: only the last line can lack its end
            raise RunError(f"{file}, line {number} is not valid JSON ({error}): remove that line") from error
        if not isinstance(row, dict):
            raise RunError(f"{file}, line {number} is not a JSON object: remove that line")
        yield row


def _differences(stored: Any, asked: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys whose values differ, with both values; a key on one side only has None on the other."""
    if isinstance(stored, dict) and isinstance(asked, dict):
        for name in {**stored, **asked}:
            yield from _differences(stored.get(name), asked.get(name), f"{key}.{name}" if key else name)
    elif stored != asked:
        yield key, stored, asked


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------------------------------------------------- files
def _write_options(path: Path, config: Mapping[str, Any]) -> None:
    """All options, in the file that `--config` reads; a run that has the file keeps it."""
    if config.get("command") in KINDS and "arguments" in config and not (path / NAME).exists():
        write_text(path / NAME, resolved(config["command"], config["arguments"]))


def _sweep(path: Path) -> None:
    """Remove what a killed writer left half done."""
    for item in [*path.iterdir(), *(path / "checkpoints").glob(".*")]:
        if item.is_dir() and (half_written(item) or item.name == _REPLACED):
            shutil.rmtree(item)
        elif half_written(item):
            item.unlink()


def _sync(file: Path) -> None:
    if file.is_file():
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
