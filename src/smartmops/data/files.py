"""Rows of JSONL, JSON, CSV, TSV and Parquet files, each with its number. Knows formats; knows no columns.

What stands in a file is what is read. `datasets` and pandas guess types: to them `NA` in a CSV is no text, `02116` is
2116, and a date in JSON is a time. They also say which row is broken, not which line. So text files are read here, by
`csv` and `json`.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from smartmops.checks.errors import DataError
from smartmops.rows.faults import Faults, shown

OWN = (".jsonl", ".ndjson", ".json")  # what an owner writes by hand, and can mend
SUFFIXES = (*OWN, ".csv", ".tsv", ".parquet")
LONGEST = 2**26  # characters of a line: a file without line ends must not fill the memory
BATCH = 256  # Parquet rows that are in memory at once
ESCAPED = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes that are not UTF-8
BLANKS = re.compile(r"\s*")
NOT_UTF8 = "not UTF-8 text ({}): convert the file, e.g. with iconv"
Row = tuple[int, Any]  # number of its line, or of the row in a file that has no lines; what stands there


def rows_of(file: Path, faults: Faults) -> Iterator[Row]:
    """Each row of a file with its number. What is no row is noted in `faults`, and reading goes on where it can.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    if ending(file) == ".parquet":
        return _parquet(file)
    if ending(file) in (".csv", ".tsv"):
        return _csv(file, faults, "," if ending(file) == ".csv" else "\t")
    return _list(file, faults) if first_character(file) == "[" else _jsonl(file, faults)


def under(folder: Path) -> list[Path]:
    """All files within a folder and the folders that it links to, but for hidden ones and those in hidden folders."""
    found, seen = list[Path](), set[str]()
    for around, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(around)) in seen:  # a link to what is read already, or a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = [Path(around, name) for name in names if not name.startswith(".")]
        found += [file for file in files if file.is_file() or file.is_symlink()]  # who reads a link to nothing says so
    return sorted(found)


def ending(file: Path) -> str:
    """What tells a file's form, in small letters."""
    return file.suffix.lower()


def unit_of(file: Path) -> str:
    """What a file's places are called."""
    return "row" if ending(file) == ".parquet" else "line"


def first_character(file: Path) -> str:
    """That is no blank; empty if there is none."""
    return next((line.strip()[0] for line in _lines(file) if line.strip()), "")


def whole(file: Path) -> str:
    """The text of a file.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{file}, line {line}: {NOT_UTF8.format(f'byte {error.start} of the file')}") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}): check the path") from error


class NoJSON(DataError):
    """A text that is no JSON.

    Attributes:
        line: Of the text, where it stops being JSON.
    """

    def __init__(self, error: Exception) -> None:
        where, reason = "", "too many lists within lists" if isinstance(error, RecursionError) else str(error)
        self.line = 1
        if isinstance(error, json.JSONDecodeError):
            self.line, where, reason = error.lineno, f" at column {error.colno}", error.msg
        super().__init__(f"not JSON{where} ({reason}): mend the line or delete it")


def value_of(text: str) -> Any:
    """What JSON says.

    Raises:
        NoJSON: it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NoJSON(error) from error


def _lines(file: Path, newline: str | None = None) -> Iterator[str]:
    try:
        with open(file, "rb") as start:
            if start.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                raise DataError(f"{file}, line 1: {NOT_UTF8.format('but UTF-16')}")
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline) as stream:
            number = 0
            while line := stream.readline(LONGEST):
                number += 1
                if len(line) == LONGEST and line[-1] not in "\r\n":
                    raise DataError(f"{file}, line {number}: {LONGEST} characters and no end of the line yet: write "
                                    "one row a line")  # fmt: skip
                yield line
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}): check the path") from error


def _jsonl(file: Path, faults: Faults) -> Iterator[Row]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        if bad := ESCAPED.search(line):
            byte = len(line[: bad.start()].encode(errors="surrogateescape"))
            faults.add(number, NOT_UTF8.format(f"byte {byte} of the line"))
            continue
        try:
            yield number, value_of(line.rstrip())
        except NoJSON as error:
            faults.add(number, str(error))


def _list(file: Path, faults: Faults) -> Iterator[Row]:
    """Elements of one JSON list. What is broken hides all that stands behind it."""
    text, decoder = whole(file), json.JSONDecoder()
    at = counted = _behind_blanks(text, text.index("[") + 1)
    number = 1 + text.count("\n", 0, at)
    more = text[at : at + 1] != "]"
    while more:
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            line = error.lineno if isinstance(error, json.JSONDecodeError) else number
            return faults.add(line, str(NoJSON(error)))
        yield number, value
        at = _behind_blanks(text, at)
        if more := text[at : at + 1] == ",":
            at = _behind_blanks(text, at + 1)
        number, counted = number + text.count("\n", counted, at), at
    if text[at : at + 1] != "]":
        faults.add(number, f"not JSON (no comma or ] behind a row, but {shown(text[at : at + 20])}): mend the line")
    elif rest := text[at + 1 :].strip():
        faults.add(number, f"behind the list stands {shown(rest[:60])}: delete it")


def _behind_blanks(text: str, at: int) -> int:
    found = BLANKS.match(text, at)
    return found.end() if found else at


def _csv(file: Path, faults: Faults, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(LONGEST)  # of the whole process; by itself it is 128 KiB, and long documents have more
    reader = csv.reader(_lines(file, ""), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            faults.add(number, f"not CSV ({error}): check the quotes from here on")
            if not header:
                return
            continue
        if not cells:
            continue
        if bad := next((cell for cell in cells if ESCAPED.search(cell)), None):
            byte = bad[ESCAPED.search(bad).start()].encode(errors="surrogateescape")  # type: ignore[union-attr]
            faults.add(number, NOT_UTF8.format(f"byte 0x{byte.hex()}"))
            if not header:
                return
        elif not header:
            header = _header([cell.strip() for cell in cells], file, number)
        elif len(cells) != len(header):
            faults.add(number, f"{len(cells)} cells, but the header has {len(header)}: quote cells that hold "
                       f"{shown(delimiter)} or a line break")  # fmt: skip
        else:
            yield number, dict(zip(header, cells, strict=True))


def _header(names: list[str], file: Path, number: int) -> list[str]:
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise DataError(f"{file}, line {number}: two columns are called {shown(twice)}: rename one")
    return names


def _parquet(file: Path) -> Iterator[Row]:
    number = 0
    try:
        with parquet.ParquetFile(file) as opened:
            classes = _classes(opened.schema_arrow)
            for batch in opened.iter_batches(BATCH):
                for row in _values(batch):
                    number += 1
                    yield number, named(row, classes)
    # Arrow raises what its decoders do; names of columns that are not UTF-8 break only when they are asked for.
    except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:120]
        raise DataError(f"{file}, row {number + 1}: not Parquet ({reason}): write the file again") from error


def named(row: dict[str, Any], classes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """A row with the names of classes in place of their numbers, by column; nothing for a number of no class."""
    numbers = {column: row[column] for column in classes if isinstance(row.get(column), int)}
    return row | {column: classes[column][number] if 0 <= number < len(classes[column]) else None
                  for column, number in numbers.items()}  # fmt: skip


def _classes(schema: pa.Schema) -> dict[str, list[str]]:
    """Names of classes by column, where `datasets` wrote the file and noted them."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b""))["info"]["features"]
        return {column: list(map(str, feature["names"])) for column, feature in features.items()
                if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"}  # fmt: skip
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}


def _values(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    names = batch.schema.names
    for at in range(batch.num_rows):
        row = {}
        for name, column in zip(names, batch.columns, strict=True):
            try:
                row[name] = column[at].as_py()
            except UnicodeDecodeError as error:
                row[name] = error.object  # bytes, which no column of text takes
        yield row


def client_files(folder: Path) -> list[Path]:
    """The files of a federation's clients in a folder, one JSONL each, in the order of their names; not hidden ones."""
    rows = (file for file in folder.iterdir() if ending(file) in (".jsonl", ".ndjson"))
    return sorted(file for file in rows if not file.name.startswith(".") and file.is_file())
