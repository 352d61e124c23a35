"""Every reader on files that nobody meant: examples or a ValueError of one line that names the file, and nothing else."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from smartmops.checks.errors import SmartmopsError
from smartmops.data.files import SUFFIXES
from smartmops.data.tasks import read
from smartmops.rows.example import Example

ROOM = 2**32  # bytes of addresses beside those that the test has already: no small file may ask for more
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


def check(folder: Path, suffix: str, content: bytes) -> list[Example] | None:
    """The examples, or none where the file is refused in our own words."""
    file = folder / f"fuzzed{suffix}"
    file.write_bytes(content)
    try:
        found = read(file)
    except ValueError as error:
        assert isinstance(error, SmartmopsError) and "fuzzed" in str(error), repr(error)
        assert "\n" not in str(error) and len(str(error)) < 8000, str(error)
        return None
    assert found and all(example.response.strip() for example in found)
    for example in found:
        "".join([example.instruction, example.context, example.response, example.category, example.system]).encode()
    return found


@pytest.fixture(scope="module", autouse=True)
def _bounded() -> Any:
    """Memory has a limit while this file runs."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=30)
@given(content=st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode(errors="surrogatepass")))
def test_bytes_of_nothing(folder: Path, suffix: str, content: bytes) -> None:
    check(folder, suffix, content)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@settings(max_examples=80)
@given(rows=st.lists(LIKELY | CHATS | ROWS | VALUES, max_size=5) | ROWS, ascii=st.booleans())
def test_values_of_wrong_types(folder: Path, suffix: str, rows: Any, ascii: bool) -> None:
    lines = suffix == ".jsonl" and isinstance(rows, list)
    text = "\n".join(json.dumps(row) for row in rows) if lines else json.dumps(rows, ensure_ascii=ascii)
    check(folder, suffix, text.encode(errors="surrogatepass"))


@settings(max_examples=50)
@given(rows=st.lists(LIKELY | CHATS | ROWS, min_size=1, max_size=4))
def test_columns_of_wrong_types(folder: Path, rows: list[dict[str, Any]]) -> None:
    sink = pa.BufferOutputStream()
    try:
        parquet.write_table(pa.Table.from_pylist(rows), sink)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError):
        return  # such rows are no table
    check(folder, ".parquet", sink.getvalue().to_pybytes())


def whole(suffix: str) -> bytes:
    if suffix == ".parquet":
        sink = pa.BufferOutputStream()
        parquet.write_table(pa.Table.from_pylist(GOOD), sink)
        return bytes(sink.getvalue().to_pybytes())
    if suffix in (".csv", ".tsv"):
        cells = [GOOD[0].keys(), *(row.values() for row in GOOD)]
        return "".join(
            ("," if suffix == ".csv" else "\t").join(json.dumps(c) for c in row) + "\n" for row in cells
        ).encode()
    return (json.dumps(GOOD) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in GOOD)).encode()


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=30)
@given(cut=st.integers(0, 2**16))
def test_a_file_that_ends_too_soon(folder: Path, suffix: str, cut: int) -> None:
    content = whole(suffix)
    assert check(folder, suffix, content)
    found = check(folder, suffix, content[: cut % len(content)])
    assert found is None or len(found) <= len(GOOD)


CHANGES: list[Callable[[bytes, int, bytes], bytes]] = [
    lambda content, at, new: content[:at] + new + content[at + len(new) :],
    lambda content, at, new: content[:at] + new + content[at:],
    lambda content, at, new: content[:at] + content[at + len(new) :],
]


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=50)
@given(at=st.integers(0, 2**16), new=st.binary(min_size=1, max_size=4), change=st.sampled_from(CHANGES))
def test_a_file_with_other_bytes(
    folder: Path, suffix: str, at: int, new: bytes, change: Callable[[bytes, int, bytes], bytes]
) -> None:
    content = whole(suffix)
    check(folder, suffix, change(content, at % len(content), new))


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("depth", [10, 900, 5_000, 100_000])
@pytest.mark.parametrize("opens", ["[", '{"a":', '{"instruction": "i", "response": "r", "history": ['])
def test_deep_nests(folder: Path, suffix: str, depth: int, opens: str) -> None:
    closes = {"[": "]", "{": "}"}
    for end in ("", "".join(closes[c] for c in reversed(opens) if c in closes)):
        check(folder, suffix, (opens * depth + end * depth).encode())
