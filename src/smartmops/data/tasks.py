"""What the command line calls DATA: names, files, folders and data sets in, `Example` out. Knows no tokens.

Two rules about empty responses. In a JSONL or JSON file, which its owner can mend, one is an error with its line. In
tables, folders and collections of others (Super-NaturalInstructions, the hub) such rows are left out, named, counted.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import pyarrow as pa

from smartmops.checks.columns import BUILT_IN, chosen_columns
from smartmops.checks.errors import ConfigError, DataError
from smartmops.rows.ahead import once, taken
from smartmops.rows.conversations import conversations
from smartmops.rows.example import Example
from smartmops.rows.faults import Faults, some
from smartmops.rows.office import office
from smartmops.rows.stored import store, take

from .files import OWN, SUFFIXES, client_files, ending, named, rows_of, unit_of
from .forms import CATEGORY, examples_of
from .several import Names, files_of, labelled, labels, names_of, others, tell_unread
from .superni import is_task, read_superni, task_files, tell_beside

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
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
TEXTS = pa.schema([
    (field.name, pa.list_(pa.list_(pa.large_string())) if field.name == "history" else pa.large_string())
    for field in fields(Example)
])  # fmt: skip


def read(
    data: str | Path | Sequence[str | Path], *, keep_general_qa: bool = False, columns: Sequence[str] = ()
) -> list[Example]:
    """Read what the command line calls DATA: one name, or a list of them.

    Rows have columns of one form: `instruction` and `response`; `instruction` and `output` (Alpaca); `prompt` and
    `completion`; `messages` or `conversations` (ShareGPT), each of whose answers becomes an example of its own.
    Optional are `context` or `input`; `category` or `task`; `source` or `client`; `system`; `history`. Columns of text
    hold text: a number is an error.

    Args:
        data: `office`, `dolly`, `superni`, a file ending in .jsonl, .ndjson, .json, .csv, .tsv or .parquet, a
            Super-NaturalInstructions .json file or a folder of them, a folder of files (the training split where their
            names tell splits; else each file's name is the task of its rows that have none), one that `datasets` saved,
            or a hub id. Of several, each one's name is the task of its rows that have none, and the source likewise.
        keep_general_qa: Keep Dolly's eighth category, which the paper leaves out. Data count as Dolly's where they have
            all eight and no others.
        columns: `FIELD=COLUMN` for columns of other names, such as `response=answer`; of several data, in each that
            does not come with the package.

    Raises:
        DataError: There is no such data, or it cannot be read; the message names file, lines and way out.
    """
    names = names_of(data)
    chosen_columns(columns)
    how = keep_general_qa, tuple(columns)
    return once((names, how), names, lambda: list(_all(names, list, *how)))


def read_stored(
    data: Names, folder: Path, *, keep_general_qa: bool = False, columns: Sequence[str] = ()
) -> Sequence[Example]:
    """`read`, one example after the other, into a memory-mapped file in `folder`: for data larger than memory.

    Raises:
        DataError: As `read`; also if the folder cannot be written to, or its disk is full.
    """

    def keep(examples: Iterable[Example]) -> Sequence[Example]:
        return store(examples, TEXTS, attrgetter(*TEXTS.names), restored, folder)

    names = names_of(data)
    chosen_columns(columns)
    how = keep_general_qa, tuple(columns)
    seen = taken((names, how), names)
    return _all(names, keep, *how) if seen is None else keep(seen)


def read_dolly(file: str | Path, *, keep_general_qa: bool = False) -> list[Example]:
    """Dolly-15k as JSONL: the seven categories of the paper's table 1; `source` is the row's `source` or `client`.

    Raises:
        DataError: A category is not one of Dolly's eight, or the file is broken (see `read_jsonl`).
    """
    return list(_dolly(read_jsonl(file), str(file), keep_general_qa))


def read_jsonl(file: str | Path, columns: Sequence[str] = ()) -> list[Example]:
    """One row a line, in one of the forms that `read` takes, and with its `columns`.

    Raises:
        DataError: Broken lines, a missing column (`category` may be missing only from all lines), a value that is no
            text, an empty response, no examples at all. The message names the file and up to ten lines.
    """
    return list(_file(Path(file), columns))


def of_clients(folder: Path, columns: Sequence[str] = ()) -> list[Example]:
    """Of all clients of a federation, one JSONL file each, `source` being the file's name without its ending."""
    return [replace(example, source=file.stem) for file in client_files(folder)
            for example in read_jsonl(file, columns)]  # fmt: skip


def read_hub(name: str, *, tasks: Collection[str] | None = None, columns: Sequence[str] = ()) -> list[Example]:
    """Rows of a hub data set, of a file, or of a folder of files, in one of the forms that `read` takes.

    Reads the `train` split where there is one, else all splits: `split` cuts its own test part.

    Args:
        name: Hub id, folder or file.
        tasks: Only rows of these categories, from all splits.
        columns: As in `read`.

    Raises:
        DataError: It cannot be loaded, or rows are broken; the message says which.
    """
    return list(_hub(name, tasks, columns))


def split(examples: Sequence[Example], test: float = 0.1, seed: int = 0) -> tuple[Sequence[Example], Sequence[Example]]:
    """Training and test part, stratified by category, each in the order given (90 % and 10 %: paper, section 4).

    Every category with two examples or more has at least one on either side; a single one goes to training. Turns of
    one conversation stay on one side, and count as one: the later ones hold the earlier ones' answers.

    Raises:
        ConfigError: `test` is not between 0 and 1.
    """
    if not 0 < test < 1:
        raise ConfigError(f"test={test}: choose a share between 0 and 1, such as 0.1")
    held: set[int] = set()
    for category, talks in conversations(examples).items():
        count = min(max(1, round(len(talks) * test)), len(talks) - 1)
        held.update(i for talk in random.Random(f"{seed} {category}").sample(talks, count) for i in talk)
    return take(examples, (i for i in range(len(examples)) if i not in held)), take(examples, sorted(held))


def splits(
    data: Names,
    limit: int | None = None,
    test: float = 0.1,
    seed: int = 0,
    validation: bool = False,
    folder: Path | None = None,
    columns: Sequence[str] = (),
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Training and test part of DATA, of which `limit` examples are drawn first: the split that every command makes.

    With `validation` the training part is split again, and nothing of the test part is returned: what is chosen by it
    was chosen without a look at the test. With `folder` both are views of a memory-mapped file in it.

    Raises:
        DataError: As `read`, `read_stored`, `sample` and `split`.
    """
    examples = read(data, columns=columns) if folder is None else read_stored(data, folder, columns=columns)
    train, held = split(examples if limit is None else sample(examples, limit, seed), test, seed)
    return split(train, test, seed) if validation else (train, held)


def sample(examples: Sequence[Example], n: int, seed: int = 0) -> Sequence[Example]:
    """`n` examples drawn from all categories alike, in the order given (5,000 in the paper, section 4).

    Raises:
        ConfigError: `n` is below 1 or above the number of examples.
    """
    if not 1 <= n <= len(examples):
        raise ConfigError(f"--limit {n}, but there are {len(examples)} examples: choose 1 to {len(examples)}")
    return take(examples, sorted(random.Random(f"{seed} sample").sample(range(len(examples)), n)))


def _all(
    names: Sequence[str],
    keep: Callable[[Iterable[Example]], Sequence[Example]],
    keep_general_qa: bool,
    columns: Sequence[str],
) -> Sequence[Example]:
    """What one name stands for; of several, all examples, each with its task and source."""
    if not names or not all(name.strip() for name in names):
        raise DataError("no data are named: give a file, a folder, a hub id, office, dolly or superni")
    if len(names) == 1:
        found = _read(names[0], keep, keep_general_qa, columns)
        _check_named(found, names[0])
        return found
    own = () if set(names) <= set(BUILT_IN) else BUILT_IN
    return keep(
        example for name, label in zip(names, labels(names), strict=True)
        for example in labelled(_read(name, keep, keep_general_qa, () if name in own else columns), label)
    )  # fmt: skip


def _read(
    data: str, keep: Callable[[Iterable[Example]], Sequence[Example]], keep_general_qa: bool, columns: Sequence[str]
) -> Sequence[Example]:
    name = {"dolly": DOLLY_HUB}.get(data, data)
    if columns and data in BUILT_IN:
        raise DataError(f"--columns {' '.join(columns)}: {data} has columns of its own: leave the option away")
    if name == "office":
        return keep(office())
    if name == "superni":
        return keep(_hub(SUPERNI_HUB, SUPERNI_TASKS))
    examples = keep(_path(name, columns))
    is_dolly = name == DOLLY_HUB or {example.category for example in examples} == {*DOLLY_TASKS, GENERAL_QA}
    return _dolly(examples, name, keep_general_qa) if is_dolly else examples


def restored(*parts: Any) -> Example:
    """An example of its parts, as `TEXTS` keeps them."""
    given = dict(zip(TEXTS.names, parts, strict=True))
    return Example(**given | {"history": tuple((user, answer) for user, answer in given["history"])})


def _path(name: str, columns: Sequence[str]) -> Iterator[Example]:
    path = Path(name)
    if path.is_dir() and (files := task_files(path)):
        tell_beside(path, files, chosen_columns(columns))
        return _without_empty((example for file in files for example in read_superni(file)), name)
    if path.is_file() and ending(path) == ".json" and is_task(path):
        return _without_empty(read_superni(path), name)
    if path.is_file() and ending(path) in SUFFIXES:
        return _file(path, columns)
    if path.is_dir() or (not path.exists() and ending(path) not in SUFFIXES and HUB_ID.fullmatch(name)):
        return _hub(name, None, columns)
    problem = f"a file ending in {path.suffix!r} cannot be read" if path.exists() else "no such file or folder"
    raise DataError(
        f"data={name!r}: {problem}. Choose office, dolly, superni, a file ending in {', '.join(SUFFIXES)}, "
        "a folder of such files or of Super-NaturalInstructions task files, or a hub id (owner/name)"
    )


def _file(
    file: Path, columns: Sequence[str], task: str = "", of: Collection[str] | None = None, *, leave_out: bool = False
) -> Iterator[Example]:
    """Examples of one file, those of the categories `of`; what is wrong with it is told when all of it was read."""
    faults, found = Faults(file, unit_of(file)), 0
    rows = _only(rows_of(file, faults), of)
    lenient = leave_out or ending(file) not in OWN
    for example in examples_of(rows, faults, chosen_columns(columns), task, leave_out_empty=lenient):
        found += 1
        yield example
    faults.check()
    if not found and of is None:
        raise DataError(f"{file} holds no examples: write one row a line, with instruction and response, or messages")


def is_stored(folder: Path) -> bool:
    """Whether it is a folder that `datasets` saved."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _hub(name: str, tasks: Collection[str] | None = None, columns: Sequence[str] = ()) -> Iterator[Example]:
    path, found = Path(name), 0
    examples: Iterator[Example]
    if path.is_file():
        examples = _file(path, columns, "", tasks)
    elif path.is_dir() and not is_stored(path):
        examples = _folder(path, columns, tasks)
    else:
        faults = Faults(name, "row")
        rows = _only(enumerate(_loaded(name, every_split=tasks is not None), 1), tasks)
        examples = examples_of(rows, faults, chosen_columns(columns), leave_out_empty=True)
        examples = _checked(examples, faults)
    for example in examples:
        found += 1
        yield example
    if not found:
        raise DataError(f"{name} holds no examples" + (f" of {', '.join(tasks)}" if tasks else ""))


def _checked(examples: Iterator[Example], faults: Faults) -> Iterator[Example]:
    yield from examples
    faults.check()


def _only(rows: Iterable[tuple[int, Any]], tasks: Collection[str] | None) -> Iterator[tuple[int, Any]]:
    """Rows of these categories."""
    for number, row in rows:
        if tasks is None or not isinstance(row, dict) or any(row.get(name) in tasks for name in CATEGORY):
            yield number, row


def _folder(folder: Path, columns: Sequence[str], tasks: Collection[str] | None) -> Iterator[Example]:
    """Examples of its files: of the training split where names tell splits, else of all, named for their tasks."""
    chosen, left = files_of(folder, tasks is not None)
    if left:
        names = some([str(file.relative_to(folder)) for file in left])
        log.info("%s: %d files beside the training split are not read (%s)", folder, len(left), names)
    tell_unread(folder, others(folder))
    for file, task in chosen:
        yield from _file(file, columns, task, tasks, leave_out=True)


def _check_named(examples: Sequence[Example], name: str) -> None:
    """Whether all examples have a category, or none has: one whose name is empty would be a task of its own."""
    blank = [number for number, example in enumerate(examples, 1) if not example.category.strip()]
    if blank and len(blank) < len(examples):
        raise DataError(f"{name}: {len(blank)} of {len(examples)} examples have no category, or an empty one (example "
                        f"{blank[0]}: {examples[blank[0] - 1].instruction[:40]!r}): give every row a category, or "
                        "none")  # fmt: skip


def _dolly(examples: Sequence[Example], name: str, keep_general_qa: bool) -> Sequence[Example]:
    for number, example in enumerate(examples, 1):
        if example.category not in (*DOLLY_TASKS, GENERAL_QA):
            raise DataError(
                f"{name}: example {number} has category={example.category!r}, which is none of Dolly's: "
                f"{', '.join((*DOLLY_TASKS, GENERAL_QA))}. Read data of your own with read_jsonl or read"
            )
    kept = take(examples, (i for i, e in enumerate(examples) if keep_general_qa or e.category != GENERAL_QA))
    if len(kept) < len(examples):
        log.info("%s: %d examples of %s left out, as in the paper", name, len(examples) - len(kept), GENERAL_QA)
    return kept


def _without_empty(examples: Iterable[Example], name: str) -> Iterator[Example]:
    empty = found = 0
    for example in examples:
        if example.response.strip():
            found += 1
            yield example
        else:
            empty += 1
    if not found:
        raise DataError(f"{name} holds no examples with a response: give instances with an output")
    if empty:
        log.warning("%s: %d examples with an empty response left out", name, empty)


def _loaded(name: str, *, every_split: bool) -> Iterator[dict[str, Any]]:
    """Rows of a `datasets.Dataset`, classes by their names; says which splits are not read."""
    found = _load(name)
    splits = found if isinstance(found, dict) else {"train": found}
    chosen = ["train"] if "train" in splits and not every_split else list(splits)
    if left := [each for each in splits if each not in chosen]:
        log.info("%s: %d splits beside the training split are not read (%s)", name, len(left), some(left))
    for each in chosen:
        classes = {column: kind.names for column, kind in splits[each].features.items() if hasattr(kind, "names")}
        yield from (named(row, classes) for row in splits[each])


def _load(name: str) -> Any:
    """A `datasets.Dataset`, or several by their splits."""
    # takes seconds to import, and most data need none of it
    from datasets import Features, Value, load_dataset, load_dataset_builder, load_from_disk

    try:
        if Path(name).is_dir():
            return load_from_disk(name)
        if load_dataset_builder(name).name == "csv":  # types that nobody gave, `datasets` guesses by pandas
            (first, *_) = load_dataset(name, nrows=1).values()
            as_text = Features({column: Value("string") for column in first.column_names})
            return load_dataset(name, features=as_text, na_filter=False)
        return load_dataset(name)
    except Exception as error:  # the loaders of `datasets` raise whatever their format's parser does
        reason = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]
        problem, way_out = "could not be loaded", "save it again"
        if not Path(name).exists():
            problem = "is no file or folder here and could not be loaded from the hub"
            way_out = "check the name and the network, or download the data and give their folder or a JSONL file"
        raise DataError(f"data={name!r} {problem} ({reason}): {way_out}") from error
