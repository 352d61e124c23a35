"""Strategies for files of data, of instructions and of options that nobody meant, and what each reader may do with them.

Shared by the tests, which take a few examples of each, and by `scripts/fuzz`, which goes on for as long as it is told.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml
from hypothesis import strategies as st
from pyarrow import parquet

from smartmops.checks.errors import SmartmopsError
from smartmops.data.asked import read_rows
from smartmops.data.files import SUFFIXES
from smartmops.data.tasks import read
from smartmops.options.federation import FederateConfig
from smartmops.options.training import TrainConfig
from smartmops.rows.example import Example
from smartmops.settings.described import described
from smartmops.settings.reading import options_of

KNOWN = st.sampled_from([
    "instruction", "input", "output", "response", "context", "prompt", "completion", "messages", "conversations",
    "category", "task", "source", "client", "system", "history", "role", "content", "from", "value", "Definition",
    "Instances", "definition", "inputs", "targets",
])  # fmt: skip
TEXT = st.text(max_size=8) | st.sampled_from(["user", "assistant", "human", "gpt", "system", "\ud83d", "", "NA"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KNOWN | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
ROWS = st.dictionaries(KNOWN, VALUES, max_size=6)
MESSAGE = st.fixed_dictionaries({"role": TEXT, "content": TEXT}) | st.fixed_dictionaries({"from": TEXT, "value": TEXT})
LIKELY = st.fixed_dictionaries(
    {"instruction": TEXT, "response": TEXT}, optional={"context": VALUES, "category": VALUES}
)
CHATS = st.fixed_dictionaries({"messages": st.lists(MESSAGE | VALUES, max_size=4)}, optional={"category": VALUES})
GOOD = [
    {"instruction": "i", "response": "r", "category": "c"},
    {"instruction": "ü", "response": "r\n", "category": "d"},
]
CHANGES: list[Callable[[bytes, int, bytes], bytes]] = [
    lambda content, at, new: content[:at] + new + content[at + len(new) :],
    lambda content, at, new: content[:at] + new + content[at:],
    lambda content, at, new: content[:at] + content[at + len(new) :],
]
CONFIGS = (TrainConfig, FederateConfig)


def encoded(text: str) -> bytes:
    """UTF-8 that may hold half a surrogate pair."""
    return text.encode(errors="surrogatepass")


def whole(suffix: str) -> bytes:
    """A good file of each kind."""
    if suffix == ".parquet":
        sink = pa.BufferOutputStream()
        parquet.write_table(pa.Table.from_pylist(GOOD), sink)
        return bytes(sink.getvalue().to_pybytes())
    if suffix in (".csv", ".tsv"):
        cells = [GOOD[0].keys(), *(row.values() for row in GOOD)]
        between = "," if suffix == ".csv" else "\t"
        return encoded("".join(between.join(json.dumps(c) for c in row) + "\n" for row in cells))
    return encoded(json.dumps(GOOD) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in GOOD))


def refused(read: Callable[[Path], Any], file: Path, content: bytes) -> Any:
    """What is read of such a file; none where it is refused in our own words, in one line that names it."""
    file.write_bytes(content)
    try:
        return read(file)
    except ValueError as error:
        assert isinstance(error, SmartmopsError) and file.stem in str(error), repr(error)
        assert "\n" not in str(error) and len(str(error)) < 8000, str(error)
        return None


def examples(folder: Path, suffix: str, content: bytes) -> list[Example] | None:
    """The examples of such a file of data; none where it is refused."""
    found: list[Example] | None = refused(read, folder / f"fuzzed{suffix}", content)
    assert sound(found)
    return found


def sound(found: list[Example] | None) -> bool:
    """Whether a reader refused, or gave at least one example, all of them with an answer, and with text that encodes."""
    for each in found or ():
        "".join([each.instruction, each.context, each.response, each.category, each.system]).encode()
    return found is None or (bool(found) and all(example.response.strip() for example in found))


@st.composite
def data(draw: Callable[..., Any]) -> tuple[str, bytes]:
    """A file of data: noise; rows with values of any type; or a good one that was cut, or has other bytes."""
    suffix, how = draw(st.sampled_from(SUFFIXES)), draw(st.sampled_from(["noise", "rows", "cut", "bytes"]))
    content = whole(suffix)
    if how == "noise":
        return suffix, draw(st.binary(max_size=200) | st.text(max_size=100).map(encoded))
    if how == "cut":
        return suffix, content[: draw(st.integers(0, len(content)))]
    if how == "bytes":
        for _ in range(draw(st.integers(1, 3))):
            at, new = draw(st.integers(0, len(content))), draw(st.binary(min_size=1, max_size=4))
            content = draw(st.sampled_from(CHANGES))(content, at, new)
        return suffix, content
    rows = draw(st.lists(LIKELY | CHATS | ROWS | VALUES, max_size=5) | ROWS)
    lines = suffix == ".jsonl" and isinstance(rows, list)
    text = "\n".join(json.dumps(row) for row in rows) if lines else json.dumps(rows, ensure_ascii=draw(st.booleans()))
    return draw(st.sampled_from([".jsonl", ".json"])) if not lines else suffix, encoded(text)


@st.composite
def options(draw: Callable[..., Any]) -> tuple[type, bytes]:
    """A file of options: known and unknown names, alone and under a group, with values of any type; or no YAML."""
    kind = draw(st.sampled_from(CONFIGS))
    if draw(st.integers(0, 4)) == 0:
        return kind, draw(st.binary(max_size=80) | st.text("ab:-[]{}&*!|>'\"\n #?%@,0.", max_size=60).map(encoded))
    known = described(kind)
    names = st.sampled_from([each.name for each in known]) | st.text(max_size=4)
    groups = st.sampled_from(sorted({each.group for each in known if each.group}))
    default = st.sampled_from([each.default for each in known if isinstance(each.default, int | float | str)])
    value = default | VALUES
    given = draw(st.dictionaries(names, value, max_size=4)) | draw(
        st.dictionaries(groups, st.dictionaries(names, value, max_size=3) | value, max_size=2)
    )
    return kind, encoded(yaml.safe_dump(given, allow_unicode=draw(st.booleans())))


@st.composite
def instructions(draw: Callable[..., Any]) -> tuple[str, bytes]:
    """A file of instructions without answers, damaged as those of data are."""
    suffix, content = draw(data())
    return suffix, content.replace(b'"response"', draw(st.sampled_from([b'"response"', b'"context"', b'"x"'])))


def fuzz_data(folder: Path, drawn: tuple[str, bytes]) -> bool:
    return examples(folder, *drawn) is not None


def fuzz_options(folder: Path, drawn: tuple[type, bytes]) -> bool:
    return refused(lambda file: options_of(file, drawn[0]), folder / "fuzzed.yaml", drawn[1]) is not None


def fuzz_instructions(folder: Path, drawn: tuple[str, bytes]) -> bool:
    rows = refused(read_rows, folder / f"fuzzed{drawn[0]}", drawn[1])
    assert rows is None or all(question.instruction.strip() for _, question in rows)
    return rows is not None


READERS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Path, Any], bool]]] = {
    "data files": (data(), fuzz_data),
    "files of instructions": (instructions(), fuzz_instructions),
    "YAML of options": (options(), fuzz_options),
}
