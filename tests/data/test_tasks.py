"""Readers, split and sample: what comes out, and what every kind of bad file says."""

from __future__ import annotations

import json
import logging
import random
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartmops.data import tasks
from smartmops.data.superni import read_superni
from smartmops.data.tasks import (
    DOLLY_TASKS,
    SUPERNI_TASKS,
    read,
    read_dolly,
    read_hub,
    read_jsonl,
    sample,
    split,
)
from smartmops.rows.example import Example
from smartmops.rows.office import HOUSE_STYLES, TASKS, episode, office, part, random_style

ROW = {"instruction": "Name it.", "context": "A cat.", "response": "Cat", "category": "closed_qa", "source": "team a"}


def write(file: Path, *rows: Mapping[str, object] | str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return file


def task(definition: object, *outputs: object) -> dict[str, object]:
    return {"Definition": definition, "Instances": [{"input": "in", "output": output} for output in outputs]}


# ----------------------------------------------------------------------------------------------------------- JSONL
def test_jsonl_rows_become_examples(tmp_path: Path) -> None:
    short = {"instruction": "Wie heißt es?", "context": None, "response": "Käse\u2028", "category": 5, "client": 0}
    file = write(tmp_path / "a.jsonl", ROW, "", short)
    assert read(str(file)) == read_jsonl(file) == [
        Example("Name it.", "A cat.", "Cat", "closed_qa", "team a"),
        Example("Wie heißt es?", "", "Käse\u2028", "5", "0"),
    ]  # fmt: skip
    byte_order_mark = "\ufeff"
    bare = write(tmp_path / "b.jsonl", byte_order_mark + json.dumps({"instruction": "i", "response": "r"}))
    assert read(str(bare)) == [Example("i", "", "r")]


def without(column: str) -> dict[str, object]:
    return {name: value for name, value in ROW.items() if name != column}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"instruction": "a", ', r"a\.jsonl, line 3: not JSON at column 21 .*: mend the line or delete it"),
        ("[1, 2]", r"line 3: \[1, 2\] is no object: write \{"),
        (without("response"), r"line 3: no column `response` \(found: instruction, context, category, source\)"),
        (
            without("instruction"),
            r"line 3: no column `instruction` \(found: context, response, .*Needed are instruction",
        ),
        (without("category"), r"line 3: no column `category` \(found"),
        (ROW | {"response": " \n"}, "line 3: empty `response`.*: write one or delete the line"),
        (ROW | {"response": None}, "line 3: empty `response`"),
        (ROW | {"context": ["a"]}, r'line 3: `context` is \["a"\], not text: write it in quotes'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: Mapping[str, object] | str, message: str) -> None:
    file = write(tmp_path / "a.jsonl", ROW, "", bad, ROW)
    with pytest.raises(ValueError, match=message):
        read(str(file))


def test_files_that_hold_nothing_readable(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes('{"instruction": "Käse"}'.encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"latin\.jsonl, line 1: not UTF-8 text \(byte 18 of the line\): convert the file"
    ):
        read(str(tmp_path / "latin.jsonl"))
    with pytest.raises(ValueError, match="holds no examples: write one row a line"):
        read(str(write(tmp_path / "empty.jsonl", "", "")))
    with pytest.raises(ValueError, match=r"gone\.jsonl cannot be read \(No such file or directory\): check the path"):
        read_jsonl(tmp_path / "gone.jsonl")


@pytest.mark.parametrize("data", ["nothing.jsonl", "some/where.jsonl", "/no/such/folder", "offic", "../a/b", "a/b/c"])
def test_data_that_is_not_there(data: str) -> None:
    with pytest.raises(ValueError, match=f"data='{data}': no such file or folder. Choose office, dolly, superni"):
        read(data)


def test_file_of_an_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a file ending in '\.txt' cannot be read\. Choose office"):
        read(str(write(tmp_path / "a.txt", ROW)))


# ----------------------------------------------------------------------------------------------------------- Dolly
def test_dolly_has_the_seven_categories_of_the_paper(tmp_path: Path) -> None:
    rows = [ROW | {"category": category, "source": None, "client": 3} for category in (*DOLLY_TASKS, "general_qa")]
    file = write(tmp_path / "dolly.jsonl", *rows)
    assert [e.category for e in read_dolly(file)] == [e.category for e in read(str(file))] == list(DOLLY_TASKS)
    assert [e.category for e in read(str(file), keep_general_qa=True)] == [*DOLLY_TASKS, "general_qa"]
    assert {e.source for e in read_dolly(file, keep_general_qa=True)} == {"3"}


def test_dolly_refuses_a_category_that_plain_jsonl_takes(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", ROW, ROW | {"category": "general_qa"}, ROW | {"category": "poetry"})
    with pytest.raises(
        ValueError, match="example 3 has category='poetry', which is none of Dolly's: creative_writing, "
    ):
        read_dolly(file)
    assert [e.category for e in read(str(file))] == ["closed_qa", "general_qa", "poetry"]


@pytest.mark.parametrize(("keep", "count"), [(False, 12_820), (True, 15_011)])
def test_the_real_dolly(shared_data: Path, keep: bool, count: int) -> None:
    examples = read(str(shared_data / "dolly15k/dolly-15k.jsonl"), keep_general_qa=keep)
    counts = Counter(e.category for e in examples)
    assert len(examples) == count
    assert counts["open_qa"] == 3742 and counts["creative_writing"] == 709 and len(counts) == 7 + keep
    assert {e.source for e in examples} == {str(client) for client in range(-1, 10)}
    train, test = split(examples)
    assert Counter(e.category for e in test) == {c: round(n * 0.1) for c, n in counts.items()}
    assert len(train) + len(test) == count


# -------------------------------------------------------------------------------------------------------- Super-NI
def test_superni_reads_the_three_forms(tmp_path: Path) -> None:
    new = write(tmp_path / "task1_new.json", task(["Do it.", "Or so."], ["first", "second"]))
    old = write(tmp_path / "subtask2_old.json", task("Do it.", ["only"]))
    plain = write(tmp_path / "task3_sapt" / "train.json", task(["Do it."], "text"))
    write(tmp_path / "INDEX.json", {"tasks": 3})
    write(tmp_path / "INDEX.tsv", "file\ttask")
    expected = {
        new: [Example("Do it.", "in", "first", "task1_new", "superni")],
        old: [Example("Do it.", "in", "only", "subtask2_old", "superni")],
        plain: [Example("Do it.", "in", "text", "task3_sapt", "superni")],
    }
    for file, examples in expected.items():
        assert read_superni(file) == read(str(file)) == examples
    assert read(str(tmp_path)) == expected[old] + expected[new] + expected[plain]


def test_empty_outputs_of_others_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path / "task1.json", task(["Do it."], ["good"], [""], []))
    assert [e.response for e in read_superni(file)] == ["good", "", ""]
    with caplog.at_level(logging.WARNING):
        assert [e.response for e in read(str(tmp_path))] == ["good"]
    assert "2 examples with an empty response left out" in caplog.text


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"Definition":\n "a"', r"bad\.json, line 2: not JSON at column 5"),
        ('{"Definition": "a", "rows":\n []}', r"bad\.json: no Super-NaturalInstructions task file.*belong in a list"),
        ({"Definition": "a"}, "an object with `Definition` and `Instances`"),
        (task("Do it.", "a", 5), "instance 2: `output` is 5, not text: write it in quotes"),
        (task(7, "a"), "instance 1: `Definition` is 7, not text"),
        ({"Definition": "a", "Instances": 3}, "`Instances` is 3, no list"),
        ({"Definition": "a", "Instances": [{"input": "b"}]}, "instance 1: needs `input` and `output`, but is"),
    ],
)
def test_a_bad_task_file_is_named(tmp_path: Path, bad: Mapping[str, object] | str, message: str) -> None:
    write(tmp_path / "task.json", task("Do it.", "text"))
    file = write(tmp_path / "zbad.json", bad)
    for data in (file, tmp_path):
        with pytest.raises(ValueError, match=message):
            read(str(data))


def test_the_real_superni(shared_data: Path) -> None:
    counts = Counter(e.category for e in read(str(shared_data / "superni/paper7")))
    assert len(counts) == 7 and sum(counts.values()) == 13_808  # one of 13,809 has an empty output
    assert {re.sub(r".*task", "task", name) for name in counts} == set(SUPERNI_TASKS)
    assert len(read(str(shared_data / "superni/sapt_superni"))) > 10_000


# ------------------------------------------------------------------------------------------------- datasets and hub
@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl", "json"])
def test_folder_in_the_layout_of_the_hub(tmp_path: Path, suffix: str) -> None:
    rows = [ROW, ROW | {"context": None, "response": "Dog"}, ROW | {"response": ""}]
    frame, folder = pandas.DataFrame(rows), tmp_path / "data"
    folder.mkdir()
    if suffix.startswith("json"):
        frame.to_json(folder / f"train-00000.{suffix}", orient="records", lines=suffix == "jsonl")
    else:
        getattr(frame, f"to_{suffix}")(folder / f"train-00000.{suffix}", index=False)
    (tmp_path / "README.md").write_text("---\nlicense: cc0-1.0\n---\n")
    expected = [Example("Name it.", "A cat.", "Cat", "closed_qa", "team a")]
    expected += [Example("Name it.", "", "Dog", "closed_qa", "team a")]
    assert read(str(tmp_path)) == expected
    if not suffix.startswith("json"):
        assert read(str(folder / f"train-00000.{suffix}")) == expected


def test_hub_form_of_superni_keeps_the_tasks_of_the_paper(tmp_path: Path) -> None:
    names = [*SUPERNI_TASKS, "task2_other"]
    rows = [{"task_name": n, "id": n, "definition": "Do it.", "inputs": "in", "targets": "out"} for n in names]
    write(tmp_path / "train" / "a.jsonl", *rows[3:])
    write(tmp_path / "test" / "a.jsonl", *rows[:3])
    examples = read_hub(str(tmp_path), tasks=SUPERNI_TASKS)
    assert sorted(e.category for e in examples) == sorted(SUPERNI_TASKS)
    assert {(e.instruction, e.context, e.response) for e in examples} == {("Do it.", "in", "out")}
    assert [e.category for e in read(str(tmp_path))] == names[3:]  # elsewhere the train split alone
    with pytest.raises(ValueError, match="holds no examples of task9"):
        read_hub(str(tmp_path), tasks=["task9"])


@pytest.mark.parametrize(("data", "hub"), [("dolly", tasks.DOLLY_HUB), ("superni", tasks.SUPERNI_HUB), ("a/b", "a/b")])
def test_hub_out_of_reach(data: str, hub: str) -> None:
    with pytest.raises(
        ValueError, match=f"data='{hub}' is no file or folder here and could not be loaded from the hub "
    ):
        read(data)


def test_folder_without_data_or_with_bad_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no file ending in \.jsonl, .*: choose another folder"):
        read(str(tmp_path))
    write(tmp_path / "train.jsonl", without("response"))
    with pytest.raises(ValueError, match=r"train\.jsonl, line 1: no column `response`"):
        read(str(tmp_path))


# ------------------------------------------------------------------------------------------------- split and sample
categories = st.lists(st.sampled_from(["a", "b", "c", ""]), max_size=80)


@given(categories, st.floats(0.01, 0.99), st.integers(0, 5))
def test_split_loses_and_repeats_nothing(names: list[str], share: float, seed: int) -> None:
    examples = [Example(str(i), "", "r", name) for i, name in enumerate(names)]
    train, test = split(examples, share, seed)
    assert sorted([*train, *test], key=lambda e: int(e.instruction)) == examples
    assert train == [e for e in examples if e in train] and test == [e for e in examples if e in test]
    assert (train, test) == split(examples, share, seed)
    for name, n in Counter(names).items():
        held = sum(e.category == name for e in test)
        assert held == 0 if n == 1 else 1 <= held < n
        assert abs(held - share * n) <= 0.5 or held in (0, 1, n - 1)


def test_split_and_sample_depend_on_the_seed() -> None:
    examples = [Example(str(i), "", "r") for i in range(100)]
    assert len(split(examples)[1]) == 10 and len(split(examples, 0.35)[1]) == 35
    assert split(examples, seed=0) != split(examples, seed=1)
    assert sample(examples, 20, seed=0) == sample(examples, 20, seed=0) != sample(examples, 20, seed=1)
    drawn = sample(examples, 20)
    assert len(set(drawn)) == 20 and drawn == [e for e in examples if e in drawn]


def test_shares_and_sizes_out_of_range() -> None:
    for share in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match=f"test={share}: choose a share between 0 and 1"):
            split([], share)
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"--limit {n}, but there are 3 examples: choose 1 to 3"):
            sample([Example("i", "", "r")] * 3, n)


# ---------------------------------------------------------------------------------------------------------- office
def test_office_is_seeded_distinct_and_in_house_style() -> None:
    examples = read("office")
    assert examples == office() != office(seed=1)
    assert Counter(e.category for e in examples) == dict.fromkeys(TASKS, 400)
    assert len({(e.instruction, e.context) for e in examples}) == len(examples)
    for e in examples:
        house = HOUSE_STYLES[e.category]
        assert e.response.startswith(house.opener + house.opener_mark)
        assert e.response.endswith(house.closer + house.closer_mark)


def test_pretraining_never_sees_an_adaptation_example_or_a_house_style() -> None:
    rng = random.Random(0)
    assert all(part(e.instruction, e.context) == "adaptation" for e in office(100))
    assert all(part(e.instruction, e.context) == "pretraining" for _ in range(100) for e in episode(rng, 5))
    houses = {(style.opener, style.closer) for style in HOUSE_STYLES.values()}
    assert not houses & {(style.opener, style.closer) for style in (random_style(rng) for _ in range(20_000))}


@pytest.mark.parametrize("per_task", [0, 701])
def test_office_has_a_limit(per_task: int) -> None:
    with pytest.raises(ValueError, match=f"per_task={per_task}: choose 1 to 700"):
        office(per_task)
