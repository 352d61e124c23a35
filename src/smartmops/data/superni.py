"""Task files of Super-NaturalInstructions: one definition and its instances. Knows this one format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smartmops.checks.errors import DataError
from smartmops.rows.example import Example
from smartmops.rows.faults import Faults, shown, some

from .files import SUFFIXES, NoJSON, ending, first_character, rows_of, under, value_of, whole
from .forms import Columns, examples_of
from .several import tell_unread


def read_superni(file: str | Path) -> list[Example]:
    """One Super-NaturalInstructions (or v1) task file: definition, input and first output of each instance.

    The category is the file's name, or the folder's where the file is called train.json or test.json. Instances with an
    empty output are returned too; `read` leaves them out.

    Raises:
        DataError: Not JSON, or not a task file; the message names all its broken instances.
    """
    path = Path(file)
    try:
        task = value_of(whole(path))
    except NoJSON as error:
        raise DataError(f"{path}, line {error.line}: {error}") from error
    if not isinstance(task, dict) or not {"Definition", "Instances"} <= task.keys():
        raise DataError(
            f"{path}: no Super-NaturalInstructions task file: that is an object with `Definition` and `Instances`. "
            "Rows with instruction and response belong in a list, or in a .jsonl file, one a line"
        )
    if not isinstance(task["Instances"], list):
        raise DataError(f"{path}: `Instances` is {shown(task['Instances'])}, no list: write one object for each")
    name = path.stem if path.stem not in ("train", "test") else path.parent.name
    faults, examples = Faults(path, "instance"), []
    for number, instance in enumerate(task["Instances"], 1):
        try:
            examples.append(_instance(task["Definition"], instance, name))
        except ValueError as error:
            faults.add(number, str(error))
    faults.check()
    return examples


def task_files(folder: Path) -> list[Path]:
    """Task files anywhere under a folder; none where its JSON files are something else."""
    files = [file for file in under(folder) if ending(file) == ".json" and not file.name.upper().startswith("INDEX")]
    return files if any('"Instances"' in whole(file) for file in files) else []


def tell_beside(folder: Path, files: Sequence[Path], chosen: Columns) -> None:
    """Say what lies beside the task files of a folder and is not read.

    Raises:
        DataError: some of it holds examples.
    """
    beside = sorted({*under(folder)} - {*files})
    rows = [str(file.relative_to(folder)) for file in beside if ending(file) in SUFFIXES and _has_rows(file, chosen)]
    if rows:
        raise DataError(f"data={str(folder)!r} holds task files of Super-NaturalInstructions and data of other forms "
                        f"({some(rows)}), which are not read together: give each kind a folder of its own, and name "
                        "both")  # fmt: skip
    tell_unread(folder, beside)


def _has_rows(file: Path, chosen: Columns) -> bool:
    faults = Faults(file)
    try:
        return next(examples_of(rows_of(file, faults), faults, chosen), None) is not None
    except DataError:
        return False  # of some other kind


def is_task(file: Path) -> bool:
    """Whether a .json file is one object, as a task file is, and neither a list of rows nor one row a line."""
    if first_character(file) != "{":
        return False
    text = whole(file).strip()
    try:
        value = value_of(text)
    except NoJSON as error:
        return "Extra data" not in str(error)
    return "\n" in text or bool(value.keys() & {"Definition", "Instances"})


def _instance(definition: Any, instance: Any, name: str) -> Example:
    if not isinstance(instance, dict) or not {"input", "output"} <= instance.keys():
        raise DataError(f"needs `input` and `output`, but is {shown(instance)}")
    texts = {"Definition": _first(definition), "input": instance["input"], "output": _first(instance["output"])}
    for column, text in texts.items():
        if not isinstance(text, str):
            raise DataError(f"`{column}` is {shown(text)}, not text: write it in quotes")
    return Example(texts["Definition"], texts["input"], texts["output"], name, "superni")


def _first(texts: Any) -> Any:
    """Task files hold one text or a list of equals, of which the first is used."""
    return (texts or [""])[0] if isinstance(texts, list) else texts
