"""Every reader on files that nobody meant: examples or a ValueError of one line that names the file, and nothing else."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from fuzzing_texts import CHANGES, CHATS, GOOD, LIKELY, READERS, ROWS, VALUES, encoded, examples, sound, whole
from smartmops.data.files import SUFFIXES

ROOM = 2**32  # bytes of addresses beside those that the test has already: no small file may ask for more


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
@given(content=st.binary(max_size=200) | st.text(max_size=100).map(encoded))
def test_bytes_of_nothing(folder: Path, suffix: str, content: bytes) -> None:
    assert sound(examples(folder, suffix, content))


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@settings(max_examples=80)
@given(rows=st.lists(LIKELY | CHATS | ROWS | VALUES, max_size=5) | ROWS, ascii=st.booleans())
def test_values_of_wrong_types(folder: Path, suffix: str, rows: Any, ascii: bool) -> None:
    lines = suffix == ".jsonl" and isinstance(rows, list)
    text = "\n".join(json.dumps(row) for row in rows) if lines else json.dumps(rows, ensure_ascii=ascii)
    assert sound(examples(folder, suffix, encoded(text)))


@settings(max_examples=50)
@given(rows=st.lists(LIKELY | CHATS | ROWS, min_size=1, max_size=4))
def test_columns_of_wrong_types(folder: Path, rows: list[dict[str, Any]]) -> None:
    sink = pa.BufferOutputStream()
    try:
        parquet.write_table(pa.Table.from_pylist(rows), sink)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError):
        return  # such rows are no table
    assert sound(examples(folder, ".parquet", sink.getvalue().to_pybytes()))


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=30)
@given(cut=st.integers(0, 2**16))
def test_a_file_that_ends_too_soon(folder: Path, suffix: str, cut: int) -> None:
    content = whole(suffix)
    assert examples(folder, suffix, content)
    found = examples(folder, suffix, content[: cut % len(content)])
    assert found is None or len(found) <= len(GOOD)


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=50)
@given(at=st.integers(0, 2**16), new=st.binary(min_size=1, max_size=4), change=st.sampled_from(CHANGES))
def test_a_file_with_other_bytes(
    folder: Path, suffix: str, at: int, new: bytes, change: Callable[[bytes, int, bytes], bytes]
) -> None:
    content = whole(suffix)
    assert sound(examples(folder, suffix, change(content, at % len(content), new)))


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("depth", [10, 900, 5_000, 100_000])
@pytest.mark.parametrize("opens", ["[", '{"a":', '{"instruction": "i", "response": "r", "history": ['])
def test_deep_nests(folder: Path, suffix: str, depth: int, opens: str) -> None:
    closes = {"[": "]", "{": "}"}
    for end in ("", "".join(closes[c] for c in reversed(opens) if c in closes)):
        assert sound(examples(folder, suffix, (opens * depth + end * depth).encode()))


@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(drawn=st.data())
def test_what_nobody_meant_is_read_or_refused_in_one_line(folder: Path, reader: str, drawn: Any) -> None:
    strategy, read = READERS[reader]
    read(folder, drawn.draw(strategy))
