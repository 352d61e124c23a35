"""What the folder of a grid belongs to: one model, limit and text to calibrate on, and each data set as it first was.

Cells and compressed bases are named by the names of data alone, so other content under these would pass for the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from hashlib import blake2b, file_digest
from pathlib import Path

from smartmops.base import local
from smartmops.base.names import is_of_hub, readable
from smartmops.checks.errors import DataError, RunError, SmartmopsError
from smartmops.compression import calibration
from smartmops.data.tasks import splits
from smartmops.rows.example import of_examples
from smartmops.runs.folder import write_text
from smartmops.states.fingerprint import VOLATILE

from .grid import Data, Grid, locked

FILE = "inputs.json"
Inputs = dict[str, list[str]]  # by what they are: as they were given, and what tells them from others


def same_grid(grid: Grid, datas: Sequence[Data], keep: bool) -> None:
    """Whether a folder was begun with this model, limit, calibration and data; with `keep`, note what it is given.

    A folder of a version that noted nothing is taken as it is, where its results do not say otherwise; one that holds
    nothing yet belongs to nobody. Without `keep` nothing is run, so data that cannot be read need not be there.

    Raises:
        RunError: it was begun with others.
        DataError: data cannot be read.
    """
    file, place = grid.out / FILE, grid.out / "runs"
    if keep:
        place.mkdir(parents=True, exist_ok=True)
    with locked(place / "inputs.lock", wait=True) if keep else nullcontext():
        then: Inputs = json.loads(file.read_text()) if file.is_file() else dict(_told(grid))
        then = then if _is_begun(grid) else {}
        now = dict(then)
        for what, given, found in _inputs(grid, datas, keep):
            was = then.get(what, [given, found])
            if was[1] != found:
                raise RunError(f"--out {grid.out} was begun with another {what} ({_shown(*was)}; now "
                               f"{_shown(given, found)}), whose cells would pass for these: choose another --out, or "
                               "ask for what it was begun with")  # fmt: skip
            now[what] = [given, found]
        if keep:
            write_text(file, json.dumps(now, indent=1) + "\n")


def _is_begun(grid: Grid) -> bool:
    """Whether there is a result, a run or a base; locks say nothing."""
    inside = [item for name in ("results", "runs", "bases") for item in (grid.out / name).glob("*")]
    return any(item.is_dir() or item.suffix == ".json" for item in inside)


def _inputs(grid: Grid, datas: Sequence[Data], needed: bool) -> Iterator[tuple[str, str, str]]:
    """What decides the numbers beside the settings of cells: the word for it, as it was given, its fingerprint."""
    yield "model", grid.model, _of_model(grid.model)
    limit, own = str(grid.limit or 0), "each training split"
    yield "limit", limit, limit
    gone = () if needed else (DataError,)
    if grid.calibration is None:
        yield "calibration", own, own
    else:
        columns = grid.columns if grid.calibration in {data.path for data in datas} else ()
        with suppress(*gone):
            yield "calibration", grid.calibration, calibration.load(grid.calibration, columns=columns).fingerprint
    for data in datas:
        with suppress(*gone):
            parts = splits(data.path, grid.limit, columns=grid.columns)
            yield f"data set {data.name}", data.path, of_examples(*parts)


def _shown(given: str, found: str) -> str:
    return given if given == found else f"{given}, fingerprint {found}"


def _of_model(model: str) -> str:
    """Content of a model folder; one of the hub is told by its name, since it may not have been fetched yet."""
    if is_of_hub(model):
        return model
    folder, total = Path(local(model)), blake2b(digest_size=16)
    with readable(model):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    total.update(json.dumps({name: config[name] for name in sorted(config.keys() - VOLATILE)}).encode())
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".bin") or file.name == "tokenizer.json":
            with open(file, "rb") as opened:
                total.update(file.name.encode() + file_digest(opened, "blake2b").digest())
    return total.hexdigest()


def _told(grid: Grid) -> Iterator[tuple[str, list[str]]]:
    """What results say of a folder where nothing was noted: the limit, and by the run of a dense base the model."""
    for file in sorted(grid.results.glob("*.json")):
        found = json.loads(file.read_text())
        if "limit" in found.get("settings", {}):
            yield "limit", [str(found["settings"]["limit"] or 0)] * 2
        run = grid.out / "runs" / file.stem / "config.json"
        model = json.loads(run.read_text())["base"] if run.is_file() and found.get("base") == "dense" else None
        if model is not None and Path(model).parent != grid.out / "bases":
            with suppress(SmartmopsError):  # it has gone, and so says nothing
                yield "model", [model, _of_model(model)]
            return
