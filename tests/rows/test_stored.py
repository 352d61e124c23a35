"""What is mapped from disk is what was written, whichever way it is looked at, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast as Tokenizer

from smartmops.data.tasks import DOLLY_TASKS, TEXTS, read, read_stored, restored, splits
from smartmops.rows import stored
from smartmops.rows.example import Example
from smartmops.rows.office import office
from smartmops.rows.stored import Stored, store, take
from smartmops.tokens.batches import Encoded, encode_all

text = st.text(st.characters(codec="utf-8"), max_size=20)
examples = st.builds(
    Example, text, text, text, text, text, text, st.lists(st.tuples(text, text), max_size=2).map(tuple)
)


def kept(items: list[Example], folder: Path) -> Stored[Example]:
    return store(items, TEXTS, attrgetter(*TEXTS.names), restored, folder)


@given(items=st.lists(examples, max_size=12), data=st.data())
def test_any_view_of_stored_items_is_that_of_a_list(
    tmp_path_factory: pytest.TempPathFactory, items: list[Example], data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "BATCH", 4)
        found = kept(items, tmp_path_factory.mktemp("rows"))
        assert list(found) == items and len(found) == len(items)
        cut = slice(*(data.draw(st.none() | st.integers(-14, 14).filter(bool)) for _ in range(3)))
        assert list(found[cut]) == items[cut]
        numbers = data.draw(st.lists(st.integers(-len(items), len(items) - 1), max_size=9)) if items else []
        assert list(take(found, numbers)) == take(items, numbers)
        some = take(found[cut], range(len(items[cut])))
        assert list(some) == items[cut]
        with pytest.raises(IndexError):
            found[len(items)]


def test_the_room_is_free_again_when_nothing_reads_it(tmp_path: Path) -> None:
    found = kept(office()[:50], tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == [], "the file has no name once it is mapped"
    assert list(found) == office()[:50]


def test_a_folder_that_cannot_hold_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"rows='.*file' cannot be written to .*: choose another folder, free some"):
        kept(office()[:5], tmp_path / "file")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stored, "_write", full)
    with pytest.raises(ValueError, match=r"\(No space left on device\).*free some of its disk, or choose rows='memory"):
        kept(office()[:5], tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file"], "nothing half written is left"


def test_items_are_read_once_and_a_batch_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "BATCH", 10)
    ahead, written = [], []
    record_batch = pa.record_batch

    def items() -> Iterator[Example]:
        for number, example in enumerate(office()[:35]):
            ahead.append(number - sum(written))
            yield example

    def counted(columns: list[pa.Array], schema: pa.Schema) -> pa.RecordBatch:
        written.append(len(columns[0]))
        return record_batch(columns, schema=schema)

    monkeypatch.setattr(pa, "record_batch", counted)
    assert len(store(items(), TEXTS, attrgetter(*TEXTS.names), restored, tmp_path)) == 35
    assert written == [10, 10, 10, 5] and max(ahead) == 9


def test_a_broken_line_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"instruction": "i", "response": "r"}\n{"instruction": "i"}\n')
    with pytest.raises(ValueError, match="line 2: no column `response`"):
        read_stored(file, tmp_path / "rows")
    assert list((tmp_path / "rows").iterdir()) == []


@pytest.mark.parametrize("kind", ["jsonl", "dolly", "superni", "csv"])
def test_every_format_is_read_the_same(tmp_path: Path, kind: str) -> None:
    names = (*DOLLY_TASKS, "general_qa")
    rows = [{"instruction": f"i{n}", "response": f"r{n}", "category": names[n % 8]} for n in range(40)]
    if kind == "jsonl":
        rows[0]["category"] = "mine"
    file = tmp_path / {"superni": "task1.json", "csv": "a.csv"}.get(kind, "a.jsonl")
    if kind == "superni":
        instances = [{"input": row["instruction"], "output": [row["response"] * (n % 3)]} for n, row in enumerate(rows)]
        file.write_text(json.dumps({"Definition": "Do it.", "Instances": instances}))
    elif kind == "csv":
        file.write_text(
            "\n".join(["instruction,response", *(f"{row['instruction']},{row['response']}" for row in rows)])
        )
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    found = read_stored(file, tmp_path / "rows")
    assert isinstance(found, Stored) and list(found) == read(file) and len(found) >= 26


@pytest.mark.parametrize("settings", [{}, {"limit": 30}, {"validation": True}, {"seed": 3, "test": 0.3}])
def test_splits_are_the_same(tmp_path: Path, settings: dict[str, float]) -> None:
    here, there = splits("office", **settings), splits("office", **settings, folder=tmp_path)
    assert [list(part) for part in there] == [list(part) for part in here]
    assert all(isinstance(part, Stored) for part in there)


def test_token_rows_are_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = office()[::9]
    texts[3] = Example("word " * 300, "", "too long", "long")

    def embed(instructions: list[str]) -> list[list[float]]:
        return [[len(each) / 3, 0.1] for each in instructions]

    for how in (None, embed):
        here = encode_all(texts, tokenizer, 120, how)
        there = encode_all(kept(texts, tmp_path), tokenizer, 120, how, tmp_path)
        assert isinstance(there.rows, Stored) and not isinstance(here.rows, Stored)
        assert there.truncation == here.truncation and here.truncation.dropped > 0
        assert list(there.kept) == list(here.kept) and 3 not in here.kept
        for one, other in zip(here.rows, there.rows, strict=True):
            assert _plain(one) == _plain(other)
            if how:
                assert one.gate_embedding is not None and other.gate_embedding is not None
                assert torch.equal(one.gate_embedding, other.gate_embedding)
    with pytest.raises(ValueError, match="none of 1 examples fits: instruction and response take"):
        encode_all(texts[3:4], tokenizer, 120, None, tmp_path)


def _plain(row: Encoded) -> tuple[object, ...]:
    return row.input_ids, row.labels, row.category, row.tokens_cut, row.shots, row.gate_embedding is None
