"""What stands in a file is what is read, and what cannot be read is named with its line, all of it at once."""

from __future__ import annotations

import csv
import json
import logging
import re
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from smartmops.data import files, tasks
from smartmops.data.files import named
from smartmops.data.tasks import read, read_stored
from smartmops.rows.example import Example
from smartmops.tokens.batches import encode_all

WORDS = [
    "None", "NA", "N/A", "null", "NULL", "nan", "NaN", "<NA>", "#N/A", "-nan", "02116", "00501", "3.10", "1e5", "1_000",
    "True", "False", "yes", "inf", "2012-01-01", "12:30", "0x1F", " padded ", '"', "a,b", "a\nb", "a\r\nb", "-0", "+1",
    "12345678901234567890",
]  # fmt: skip


def line(**row: object) -> str:
    return json.dumps({"instruction": "i", "response": "r"} | row) + "\n"


def message(file: Path) -> str:
    with pytest.raises(ValueError, match=file.name) as found:
        read(file)
    assert "\n" not in str(found.value)
    return str(found.value).replace(str(file), file.name)


# ---------------------------------------------------------------------------------------------------- text stays text
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("column", ["instruction", "context", "response", "category", "source", "system"])
def test_words_of_a_table_are_read_as_written(tmp_path: Path, suffix: str, column: str) -> None:
    """Each word alone too: types are guessed from whole columns."""
    for words in [WORDS, *([word] for word in WORDS)]:
        rows = [{"instruction": "i", "response": "r"} | {column: word} for word in words]
        with open(tmp_path / f"a{suffix}", "w", newline="") as stream:
            table = csv.DictWriter(stream, list(rows[0]), delimiter="," if suffix == ".csv" else "\t")
            table.writeheader()
            table.writerows(rows)
        assert [getattr(example, column) for example in read(tmp_path / f"a{suffix}")] == words


def test_a_folder_of_tables_is_read_as_written_and_names_its_tasks(tmp_path: Path) -> None:
    (tmp_path / "codes.csv").write_text("prompt,completion\nBoston?,02116\nNone?,None\n")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "dates.jsonl").write_text(line(response="2012-01-01"))
    (tmp_path / "own.tsv").write_text("instruction\tresponse\ttask\nq\tNA\tmine\n")
    (tmp_path / ".hidden.jsonl").write_text("not read")
    found = [(example.response, example.category) for example in read(tmp_path)]
    assert found == [("02116", "codes"), ("None", "codes"), ("2012-01-01", "dates"), ("NA", "mine")]
    (tmp_path / "codes_test.csv").write_text("prompt,completion\nheld,held\n")
    (tmp_path / "codes_train.csv").write_text("prompt,completion\nBoston?,02116\n")
    assert read(tmp_path) == [Example("Boston?", "", "02116")]


def test_text_of_the_hub_stays_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    folder = tmp_path / "owner" / "codes"
    folder.mkdir(parents=True)
    (folder / "train.csv").write_text("instruction,response\nBoston?,02116\nNone?,NA\nTrue?,True\n")
    for name in ("load_dataset", "load_dataset_builder"):
        loaded = getattr(datasets, name)
        monkeypatch.setattr(datasets, name, lambda _, loaded=loaded, **how: loaded(str(folder), **how))
    assert [example.response for example in read("owner/codes")] == ["02116", "NA", "True"]


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    table = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["NA", "02116"]})
    table.save_to_disk(tmp_path / "one")
    DatasetDict(train=table, test=table).save_to_disk(tmp_path / "two")
    for name in ("one", "two"):
        assert read(tmp_path / name) == [Example("a", "", "NA"), Example("b", "", "02116")]


def test_classes_are_read_by_their_names_and_splits_that_are_not_read_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    kinds = Features(instruction=Value("string"), response=Value("string"), category=ClassLabel(names=["qa", "sums"]))
    table = Dataset.from_dict({"instruction": ["a", "b"], "response": ["c", "d"], "category": [1, 0]}, kinds)
    DatasetDict(train=table, test=table).save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "table.parquet")
    with caplog.at_level(logging.INFO, "smartmops.data"):
        for name in ("saved", "table.parquet"):
            assert [example.category for example in read(tmp_path / name)] == ["sums", "qa"]
    assert f"{tmp_path / 'saved'}: 1 splits beside the training split are not read (test)" in caplog.messages
    assert named({"category": -1, "response": "c"}, {"category": ["qa"]}) == {"category": None, "response": "c"}


@given(st.lists(st.tuples(*[st.text(st.characters(codec="utf-8"), max_size=12)] * 2), max_size=6))
def test_any_text_survives_any_file(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]) -> None:
    rows = [{"instruction": asked, "response": f"r{answer}"} for asked, answer in pairs] + [
        {"instruction": "i", "response": "r"}
    ]
    folder = tmp_path_factory.mktemp("any")
    (folder / "a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), newline="")
    (folder / "a.json").write_text(json.dumps(rows, ensure_ascii=False), newline="")
    parquet.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    with open(folder / "a.csv", "w", newline="") as stream:
        csv.writer(stream, quoting=csv.QUOTE_ALL).writerows([rows[0].keys(), *(row.values() for row in rows)])
    expected = [Example(row["instruction"], "", row["response"]) for row in rows]
    for name in ("a.jsonl", "a.json", "a.parquet", "a.csv"):
        assert read(folder / name) == expected, name


# -------------------------------------------------------------------------------------------------------- what is not
@pytest.mark.parametrize("value", [3, -1, 3.1, True, False, ["a"], {"a": 1}, 10**30])
@pytest.mark.parametrize("column", ["instruction", "response", "context", "system"])
def test_what_is_no_text_is_refused(tmp_path: Path, column: str, value: object) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(line() + line(**{column: value}) + line(**{column: value}) + line())
    assert message(file) == f"a.jsonl, lines 2 and 3: `{column}` is {json.dumps(value)}, not text: write it in quotes"
    parquet.write_table(pa.table({"instruction": ["i"], "response": ["r"]} | {column: [7.5]}), tmp_path / "a.parquet")
    assert message(tmp_path / "a.parquet").endswith(f"row 1: `{column}` is 7.5, not text: store the column as text")


@pytest.mark.parametrize(
    ("good", "problem"),
    [(b"instruction", r"row 1: not Parquet \("), (b"an answer", r"row 1: `response` is .*, not text")],
)
def test_parquet_that_is_not_utf8(tmp_path: Path, good: bytes, problem: str) -> None:
    file = tmp_path / "a.parquet"
    table = pa.table({"instruction": ["i"], "response": ["an answer"]})
    parquet.write_table(table, file, use_dictionary=False, compression="none", write_statistics=False)
    file.write_bytes(file.read_bytes().replace(good, b"\xff" + good[1:]))
    assert re.search(problem, message(file))


def test_names_may_be_numbers_but_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(line(category=3, client=0))
    assert read(file) == [Example("i", "", "r", "3", "0")]
    file.write_text(line(category=True) + line(category=1.5) + line(category=["a"]))
    assert message(file).count("not text") == 3


def test_times_in_parquet_are_no_text(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"instruction": ["i"], "response": [datetime(2020, 1, 1)]}), tmp_path / "a.parquet")
    assert 'row 1: `response` is "2020-01-01 00:00:00", not text' in message(tmp_path / "a.parquet")


@pytest.mark.parametrize("column", ["instruction", "context", "response", "category", "source", "system"])
@pytest.mark.parametrize("half", ["\ud83d", "a\udc00", "\udc80"])
def test_half_a_character_is_named(tmp_path: Path, column: str, half: str) -> None:
    file = tmp_path / "a.jsonl"
    ours = {"category": "c"} if column == "category" else {}
    file.write_text(line(**ours) + line(**{column: half}) + line(**ours))
    assert message(file).startswith(
        f"a.jsonl, line 2: `{column}` holds {ascii(half[-1])[1:-1]} as character {len(half)}, which"
    )
    with pytest.raises(ValueError, match=r"line 2: .*half a character"):
        read_stored(file, tmp_path / "rows")
    assert list((tmp_path / "rows").iterdir()) == []
    file.write_text(line(**{column: "whole \ud83d\ude00"}))
    assert getattr(read(file)[0], column) == "whole \U0001f600"


def test_half_a_character_is_no_example() -> None:
    for parts in ({"instruction": "\ud83d"}, {"history": (("a", "\ud83d"),)}):
        with pytest.raises(ValueError, match=r"`(instruction|history)` holds \\ud83d as character 1"):
            Example(**{"instruction": "i", "context": "", "response": "r"} | parts)


# ------------------------------------------------------------------------------------------------ all bad lines at once
def test_all_bad_lines_are_named_at_once(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(
        line() + line(response="") + "{\n" + line(response=3) + "\n" + line(response=" ") + '{"response": "r"}\n'
    )
    assert message(file) == (
        "a.jsonl, lines 2 and 6: empty `response`, so nothing to learn: write one or delete the line; "
        "line 3: not JSON at column 2 (Expecting property name enclosed in double quotes): mend the line or delete it; "
        "line 4: `response` is 3, not text: write it in quotes; "
        "line 7: no column `instruction` (found: response). Needed are instruction and response"
    )


@pytest.mark.parametrize(("bad", "told"), [(10, ""), (11, "; and 1 more bad lines"), (60, "; and 50 more bad lines")])
def test_ten_are_named_and_the_others_counted(tmp_path: Path, bad: int, told: str) -> None:
    for suffix, text in ((".jsonl", line(response=3)), (".csv", "only one\n")):
        file = tmp_path / f"a{suffix}"
        file.write_text(("" if suffix == ".jsonl" else "instruction,response\n") + text * bad)
        first = 1 if suffix == ".jsonl" else 2
        named = f"a{suffix}, lines {', '.join(str(n) for n in range(first, first + 9))} and {first + 9}: "
        assert message(file).startswith(named) and message(file).endswith(told)


def test_lines_of_a_table_are_lines_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(
        b'\xef\xbb\xbfinstruction,response\r\n"two\r\nlines",r\r\n\r\nonly one\r\ni,r,more\r\n\xe4,r\r\n"a"b,r\r\nlast,"open\r\n'
    )
    assert message(file) == (
        'a.csv, line 5: 1 cells, but the header has 2: quote cells that hold "," or a line break; '
        'line 6: 3 cells, but the header has 2: quote cells that hold "," or a line break; '
        "line 7: not UTF-8 text (byte 0xe4): convert the file, e.g. with iconv; "
        "line 8: not CSV (',' expected after '\"'): check the quotes from here on; "
        "line 9: not CSV (unexpected end of data): check the quotes from here on"
    )


def test_rows_of_a_list_have_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    rows = [json.dumps({"instruction": "i", "output": output}, indent=1) for output in ("r", 5, "", "r")]
    file.write_text("\n[\n" + ",\n\n".join(rows) + "\n]\n")
    assert message(file) == (
        "a.json, line 8: `output` is 5, not text: write it in quotes; "
        "line 13: empty `output`, so nothing to learn: write one or delete the line"
    )
    file.write_text("[\n" + rows[0] + "\n" + rows[0] + "]")
    assert message(file).startswith("a.json, line 6: not JSON (no comma or ] behind a row")
    file.write_text("[\n" + rows[0] + ",\n]")
    assert message(file).startswith("a.json, line 6: not JSON at column 1 (Expecting value)")
    file.write_text("[" + rows[0] + "] and more")
    assert 'line 4: behind the list stands "and more": delete it' in message(file)
    (tmp_path / "lines.json").write_text(line() * 2)
    (tmp_path / "list.jsonl").write_text(json.dumps([json.loads(line())] * 2))
    assert read(tmp_path / "lines.json") == read(tmp_path / "list.jsonl") == [Example("i", "", "r")] * 2


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", line().encode("utf-16"), "a.jsonl, line 1: not UTF-8 text (but UTF-16)"),
        ("a.csv", "instruction,response\ni,r\n".encode("utf-16"), "a.csv, line 1: not UTF-8 text (but UTF-16)"),
        ("a.json", b'[\n{"instruction": "\xe4"}]', "a.json, line 2: not UTF-8 text (byte 19 of the file)"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: not JSON (too many lists within lists)"),
        ("b.jsonl", line().encode() + b'{"a":' * 100_000 + b"\n", "b.jsonl, line 2: not JSON (too many lists within lists)"),
        ("a.json", b'{"a":' * 100_000, "a.json, line 1: not JSON (too many lists within lists)"),
        ("a.jsonl", line(response="X").replace('"X"', "9" * 5000).encode(), "a.jsonl, line 1: not JSON (Exceeds the limit"),
        ("a.jsonl", line(response="X").replace('"X"', "NaN").encode(), "a.jsonl, line 1: `response` is NaN, not text"),
        ("a.csv", b"response,instruction,response\na,b,c\n", 'a.csv, line 1: two columns are called "response": rename one'),
        ("a.csv", b"instruction,response\n", "a.csv holds no examples"),
        ("a.csv", b"", "a.csv holds no examples"),
        ("a.csv", b'"instruction,response\ni,r\n', "a.csv, line 1: not CSV (unexpected end of data)"),
        ("a.csv", b"instruction;response\ni;r\n", "a.csv, line 2: no columns that are known (found: instruction;response)"),
        ("a.parquet", b"PAR1 but not really", "a.parquet, row 1: not Parquet ("),
        ("a.parquet", b"", "a.parquet, row 1: not Parquet ("),
    ],
)  # fmt: skip
def test_files_of_a_wrong_kind(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert message(tmp_path / name).startswith(problem)


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LONGEST", 1000)
    for name, content in (("a.jsonl", line(response="r" * 2000)), ("a.csv", "instruction,response\n" + "i" * 2000)):
        (tmp_path / name).write_text(content)
        assert "1000 characters and no end of the line yet: write one row a line" in message(tmp_path / name)
    (tmp_path / "b.csv").write_text('instruction,response\n"open,r\n' + "i,r\n" * 600 + '"')
    assert "line 2: not CSV (field larger than field limit (1000)): check the quotes" in message(tmp_path / "b.csv")


def test_long_cells_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("instruction,response\n" + "i" * 300_000 + ",r\n")
    assert len(read(tmp_path / "a.csv")[0].instruction) == 300_000


def test_what_is_left_out_is_named_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.csv").write_text("instruction,response\ni,r\ni,\n,r\ni, \n" + "i,\n" * 12)
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path / "a.csv") == [Example("i", "", "r"), Example("", "", "r")]
    assert (
        "a.csv: 14 examples with an empty response left out (lines 3, 5, 6, 7, 8, 9, 10, 11, 12 and 13, ...)"
        in caplog.text
    )
    assert "a.csv: 1 examples ask nothing: neither instruction nor context (line 4)" in caplog.text


def test_a_category_is_on_all_rows_or_on_none(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(line() + line(category="c") + line())
    assert message(file).startswith("a.jsonl, line 2: a column `category`, which rows before lack")
    file.write_text(line(task="c") + line())
    assert message(file).startswith("a.jsonl, line 2: no column `task` (found: instruction, response)")


def test_hub_rows_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_loaded", lambda *_, **__: [{"prompt": "a", "completion": n} for n in ("b", 3, 4)])
    with pytest.raises(
        ValueError, match="owner/data, row 2: `completion` is 3, not text: store the column as text; row 3"
    ):
        read("owner/data")


def test_rows_reach_the_tokens(tmp_path: Path, tokenizer: object) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\nBoston?,02116\n")
    found = encode_all(read(tmp_path / "a.csv"), tokenizer, 128).rows[0]
    answer = [token for token in found.labels if token >= 0]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == "02116"
