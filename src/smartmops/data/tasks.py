"""Readers and splits: files and data sets in, `Example` out. Knows formats; knows no tokens and no models.

Two rules about empty responses. In a JSONL file, which its owner can mend, one is an error with its line. In
collections made by others (Super-NaturalInstructions, the hub) such rows are left out, and their number is logged.
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any

import pyarrow as pa

from .example import Example
from .office import office
from .stored import store, take

log = logging.getLogger(__name__)

# Table 1 of the paper. Dolly has an eighth category, which the paper leaves out.
DOLLY_TASKS = (
    "creative_writing",
    "closed_qa",
    "open_qa",
    "summarization",
    "information_extraction",
    "classification",
    "brainstorming",
)
GENERAL_QA = "general_qa"
SUPERNI_TASKS = (
    "task001_quoref_question_generation",
    "task026_drop_question_generation",
    "task044_essential_terms_identifying_essential_words",
    "task1190_add_integer_to_list",
    "task1429_evalution_semantic_relation_classification",
    "task1703_ljspeech_textmodification",
    "task698_mmmlu_answer_generation_global_facts",
)
DOLLY_HUB = "databricks/databricks-dolly-15k"
SUPERNI_HUB = "Muennighoff/natural-instructions"  # columns task_name, definition, inputs, targets
SUPERNI_COLUMNS = {"definition": "instruction", "inputs": "context", "targets": "response", "task_name": "category"}
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
NEEDED = ("instruction", "response")
TEXTS = pa.schema([
    (field.name, pa.list_(pa.list_(pa.large_string())) if field.name == "history" else pa.large_string())
    for field in fields(Example)
])  # fmt: skip


def read(data: str | Path, *, keep_general_qa: bool = False) -> list[Example]:
    """Read what the command line calls DATA.

    Args:
        data: `office`, `dolly`, `superni`, a JSONL file, a Super-NaturalInstructions .json file or a folder of them, a
            .csv or .parquet file, a folder in the hub's layout, or a hub id.
        keep_general_qa: Keep Dolly's eighth category, which the paper leaves out. Data count as Dolly's where they use
            its category names and no others.

    Raises:
        ValueError: There is no such data, or it cannot be read; the message names file, line and way out.
    """
    return list(_read(str(data), list, keep_general_qa))


def read_stored(data: str | Path, folder: Path, *, keep_general_qa: bool = False) -> Sequence[Example]:
    """`read`, one example after the other, into a memory-mapped file in `folder`: for data larger than memory.

    Raises:
        ValueError: As `read`; also if the folder cannot be written to, or its disk is full.
    """
    return _read(
        str(data), lambda examples: store(examples, TEXTS, attrgetter(*TEXTS.names), restored, folder), keep_general_qa
    )


def read_dolly(file: str | Path, *, keep_general_qa: bool = False) -> list[Example]:
    """Dolly-15k as JSONL: the seven categories of the paper's table 1; `source` is the row's `source` or `client`.

    Raises:
        ValueError: A category is not one of Dolly's eight, or the file is broken (see `read_jsonl`).
    """
    return list(_dolly(read_jsonl(file), str(file), keep_general_qa))


def read_superni(file: str | Path) -> list[Example]:
    """One Super-NaturalInstructions (or v1) task file: definition, input and first output of each instance.

    The category is the file's name, or the folder's where the file is called train.json or test.json. Instances with an
    empty output are returned too; `read` leaves them out.

    Raises:
        ValueError: Not JSON, or not a task file.
    """
    path = Path(file)
    task = _json(_text(path), path)
    if not isinstance(task, dict) or not {"Definition", "Instances"} <= task.keys():
        raise ValueError(
            f"{path}: no Super-NaturalInstructions task file: that is an object with `Definition` and `Instances`. "
            "Rows with instruction and response belong in a .jsonl file, one a line"
        )
    definition, name = _first(task["Definition"]), path.stem if path.stem not in ("train", "test") else path.parent.name
    examples = []
    for number, instance in enumerate(task["Instances"], 1):
        if not isinstance(instance, dict) or not {"input", "output"} <= instance.keys():
            raise ValueError(
                f"{path}: instance {number} needs `input` and `output`, but is {json.dumps(instance)[:60]}"
            )
        examples.append(Example(definition, instance["input"], _first(instance["output"]), name, "superni"))
    return examples


def read_jsonl(file: str | Path) -> list[Example]:
    """One example a line: `instruction` and `response`; optional `context`, `category`, and `source` or `client`.

    Raises:
        ValueError: A broken line, a missing column (`category` may be missing only from all lines), a value that is no
            text, an empty response, no examples at all. The message names file and line.
    """
    return list(_jsonl(Path(file)))


def read_hub(name: str, *, tasks: Collection[str] | None = None) -> list[Example]:
    """Rows of a hub data set, a folder in the hub's layout, or a .csv or .parquet file, through `datasets`.

    Columns are those of `read_jsonl`, or `definition`, `inputs`, `targets` and `task_name`. Reads the `train` split
    where there is one, else all splits: `split` cuts its own test part.

    Args:
        name: Hub id, folder or file.
        tasks: Only rows of these categories, from all splits.

    Raises:
        ValueError: It cannot be loaded, or a row is broken; the message says which.
    """
    return list(_hub(name, tasks))


def split(examples: Sequence[Example], test: float = 0.1, seed: int = 0) -> tuple[Sequence[Example], Sequence[Example]]:
    """Training and test part, stratified by category, each in the order given (90 % and 10 %: paper, section 4).

    Every category with two examples or more has at least one on either side; a single one goes to training.

    Raises:
        ValueError: `test` is not between 0 and 1.
    """
    if not 0 < test < 1:
        raise ValueError(f"test={test}: choose a share between 0 and 1, such as 0.1")
    members = defaultdict(list)
    for index, example in enumerate(examples):
        members[example.category].append(index)
    held: set[int] = set()
    for category, indices in members.items():
        count = min(max(1, round(len(indices) * test)), len(indices) - 1)
        held.update(random.Random(f"{seed} {category}").sample(indices, count))
    return take(examples, (i for i in range(len(examples)) if i not in held)), take(examples, sorted(held))


def splits(
    data: str | Path,
    limit: int | None = None,
    test: float = 0.1,
    seed: int = 0,
    validation: bool = False,
    folder: Path | None = None,
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Training and test part of DATA, of which `limit` examples are drawn first: the split that every command makes.

    With `validation` the training part is split again, and nothing of the test part is returned: what is chosen by it
    was chosen without a look at the test. With `folder` both are views of a memory-mapped file in it.

    Raises:
        ValueError: As `read`, `read_stored`, `sample` and `split`.
    """
    examples = read(data) if folder is None else read_stored(data, folder)
    train, held = split(examples if limit is None else sample(examples, limit, seed), test, seed)
    return split(train, test, seed) if validation else (train, held)


def sample(examples: Sequence[Example], n: int, seed: int = 0) -> Sequence[Example]:
    """`n` examples drawn from all categories alike, in the order given (5,000 in the paper, section 4).

    Raises:
        ValueError: `n` is below 1 or above the number of examples.
    """
    if not 1 <= n <= len(examples):
        raise ValueError(f"--limit {n}, but there are {len(examples)} examples: choose 1 to {len(examples)}")
    return take(examples, sorted(random.Random(f"{seed} sample").sample(range(len(examples)), n)))


def _read(
    data: str, keep: Callable[[Iterable[Example]], Sequence[Example]], keep_general_qa: bool
) -> Sequence[Example]:
    name = {"dolly": DOLLY_HUB}.get(data, data)
    if name == "office":
        return keep(office())
    if name == "superni":
        return keep(_hub(SUPERNI_HUB, SUPERNI_TASKS))
    examples = keep(_path(name))
    is_dolly = name == DOLLY_HUB or {example.category for example in examples} <= {*DOLLY_TASKS, GENERAL_QA}
    return _dolly(examples, name, keep_general_qa) if is_dolly else examples


def restored(*parts: Any) -> Example:
    """An example of its parts, as `TEXTS` keeps them."""
    given = dict(zip(TEXTS.names, parts, strict=True))
    return Example(**given | {"history": tuple((user, answer) for user, answer in given["history"])})


def _path(name: str) -> Iterator[Example]:
    path = Path(name)
    if path.is_dir() and (files := _superni_files(path)):
        return _without_empty((example for file in files for example in read_superni(file)), name)
    if path.is_file() and path.suffix == ".json":
        return _without_empty(read_superni(path), name)
    if path.is_file() and path.suffix == ".jsonl":
        return _jsonl(path)
    is_hub_id = not path.exists() and path.suffix not in FILE_SUFFIXES and HUB_ID.fullmatch(name)
    if is_hub_id or path.is_dir() or (path.is_file() and path.suffix in FILE_SUFFIXES):
        return _hub(name)
    problem = f"a file ending in {path.suffix!r} cannot be read" if path.exists() else "no such file or folder"
    raise ValueError(
        f"data={name!r}: {problem}. Choose office, dolly, superni, a file ending in {', '.join(FILE_SUFFIXES)}, "
        "a folder of Super-NaturalInstructions task files or in the hub's layout, or a hub id (owner/name)"
    )


def _jsonl(file: Path) -> Iterator[Example]:
    needed: tuple[str, ...] = NEEDED
    found = 0
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        row = _json(line, file, number)
        if not isinstance(row, dict):
            raise ValueError(
                f'{where}: {line.strip()[:40]!r} is no object: write {{"instruction": ..., "response": ...}}'
            )
        if not found and "category" in row:
            needed = (*NEEDED, "category")
        example = _example(row, where, needed)
        if not example.response.strip():
            raise ValueError(f"{where}: empty `response`, so nothing to learn: write one or delete the line")
        found += 1
        yield example
    if not found:
        raise ValueError(f"{file} holds no examples: write one JSON object a line, with `instruction` and `response`")


def _hub(name: str, tasks: Collection[str] | None = None) -> Iterator[Example]:
    rows = _load(name, every_split=tasks is not None)
    if "instruction" not in rows.column_names:
        rows = rows.rename_columns({old: new for old, new in SUPERNI_COLUMNS.items() if old in rows.column_names})
    if tasks is not None and "category" in rows.column_names:
        rows = rows.filter(lambda category: category in tasks, input_columns="category")
    found = 0
    for example in _without_empty((_example(row, f"{name}, row {n}", NEEDED) for n, row in enumerate(rows, 1)), name):
        found += 1
        yield example
    if not found:
        raise ValueError(f"{name} holds no examples" + (f" of {', '.join(tasks)}" if tasks else ""))


def _dolly(examples: Sequence[Example], name: str, keep_general_qa: bool) -> Sequence[Example]:
    for number, example in enumerate(examples, 1):
        if example.category not in (*DOLLY_TASKS, GENERAL_QA):
            raise ValueError(
                f"{name}: example {number} has category={example.category!r}, which is none of Dolly's: "
                f"{', '.join((*DOLLY_TASKS, GENERAL_QA))}. Read data of your own with read_jsonl or read"
            )
    kept = take(examples, (i for i, e in enumerate(examples) if keep_general_qa or e.category != GENERAL_QA))
    if len(kept) < len(examples):
        log.info("%s: %d examples of %s left out, as in the paper", name, len(examples) - len(kept), GENERAL_QA)
    return kept


def _superni_files(folder: Path) -> list[Path]:
    """Task files anywhere under a folder; none where its JSON files are something else."""
    files = sorted(file for file in folder.rglob("*.json") if not file.name.upper().startswith("INDEX"))
    return files if any('"Instances"' in _text(file) for file in files) else []


def _without_empty(examples: Iterable[Example], name: str) -> Iterator[Example]:
    empty = 0
    for example in examples:
        if example.response.strip():
            yield example
        else:
            empty += 1
    if empty:
        log.warning("%s: %d examples with an empty response left out", name, empty)


def _load(name: str, *, every_split: bool) -> Any:
    """All rows as one `datasets.Dataset`."""
    from datasets import concatenate_datasets, load_dataset  # takes seconds to import; most data need none of it

    path = Path(name)
    try:
        found = load_dataset(path.suffix[1:], data_files=name) if path.is_file() else load_dataset(name)
    except Exception as error:  # the loaders of `datasets` raise whatever their format's parser does
        reason = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]
        problem, way_out = "could not be loaded", "mend the files"
        if not path.exists():
            problem = "is no file or folder here and could not be loaded from the hub"
            way_out = "check the name and the network, or download the data and give their folder or a JSONL file"
        raise ValueError(f"data={name!r} {problem} ({reason}): {way_out}") from error
    splits = [found["train"]] if "train" in found and not every_split else list(found.values())
    return concatenate_datasets(splits)


def _example(row: Mapping[str, Any], where: str, needed: Iterable[str]) -> Example:
    for column in needed:
        if column not in row:
            raise ValueError(
                f"{where}: no column `{column}` (found: {', '.join(row) or 'none'}). Needed are "
                f"{', '.join(needed)}; optional are context, category, source"
            )
    source = "source" if row.get("source") is not None else "client"
    text = {column: _value(row, column, where) for column in (*NEEDED, "context", "category", source)}
    return Example(text["instruction"], text["context"], text["response"], text["category"], text[source])


def _value(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{where}: `{column}` is {json.dumps(value, default=str)[:40]}, not text: write it in quotes")
    return str(value)


def _first(texts: str | list[str]) -> str:
    """Task files hold one text or a list of equals, of which the first is used."""
    return texts if isinstance(texts, str) else (texts or [""])[0]


def _lines(file: Path) -> Iterator[str]:
    try:
        with open(file, encoding="utf-8-sig") as lines:
            yield from (line.removesuffix("\n") for line in lines)
    except (OSError, UnicodeDecodeError):
        _text(file)  # says what is wrong with it
        raise


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text (byte {error.start}): convert it, e.g. with iconv") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}): check the path") from error


def _json(text: str, file: str | Path, line: int | None = None) -> Any:
    """The value of a whole file, or of one line of it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{file}, line {line or error.lineno}, column {error.colno}"
        raise ValueError(f"{where}: not JSON ({error.msg}): mend the line or delete it") from error
