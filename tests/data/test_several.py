"""Several data at once: what each row's task and source are, what is refused, and that nothing small is read twice."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas
import pytest

import smartmops as sm
from smartmops.checks.errors import ConfigError, DataError
from smartmops.checks.limits import check
from smartmops.data import tasks
from smartmops.data.several import labels
from smartmops.data.tasks import read, read_stored, splits
from smartmops.options.finished.reading import DataConfig
from smartmops.rows.ahead import ahead
from smartmops.rows.example import Example
from smartmops.settings.line import asked


def lines(file: Path, *rows: dict[str, Any]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


ROW = {"instruction": "Count.", "response": "One."}


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """A file without tasks and sources, and one whose first row has both."""
    (tmp_path / "tickets.csv").write_text("question,answer,team,source\nWhy?,So.,billing,berlin\nHow?,Thus.,,\n")
    return [lines(tmp_path / "numbers.jsonl", ROW, ROW), str(tmp_path / "tickets.csv")]


@pytest.fixture
def read_files(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file is opened for its rows."""
    found, rows = Counter[str](), tasks.rows_of

    def counted(file: Path, faults: Any) -> Any:
        found[file.name] += 1
        return rows(file, faults)

    monkeypatch.setattr(tasks, "rows_of", counted)
    return found


def test_each_is_the_task_and_the_source_of_its_rows_that_have_none(two: list[str], tmp_path: Path) -> None:
    (tmp_path / "tickets.csv").write_text(
        "instruction,response,category,source\nWhy?,So.,billing,berlin\nHow?,Thus.,,\n"
    )
    found = sm.read(two)
    assert [(each.category, each.source) for each in found] == [
        ("numbers", "numbers"), ("numbers", "numbers"), ("billing", "berlin"), ("tickets", "tickets"),
    ]  # fmt: skip
    assert read([two[0]]) == read(two[0]) == [Example("Count.", "", "One.")] * 2, "one alone is as it was"
    assert list(read_stored(two, tmp_path / "rows")) == found


def test_columns_are_those_of_files_and_not_of_data_that_come_with_the_package(two: list[str]) -> None:
    columns = ("instruction=question", "response=answer", "category=team")
    found = read(["office", two[1]], columns=columns)
    assert {"billing", "tickets"} < {each.category for each in found} and len(found) > 100
    assert Counter(each.source for each in found)["office"] == len(found) - 2
    with pytest.raises(DataError, match=r"numbers\.jsonl, lines 1 and 2: --columns .*: no such column"):
        read(two, columns=columns)
    with pytest.raises(DataError, match=r"office has columns of its own: leave the option away"):
        read(["office", "superni"], columns=columns)


def test_names_that_are_alike_are_told_apart_by_where_they_lie() -> None:
    assert labels(["a/x.jsonl", "b/x.csv", "c/y.tsv", "me/z.v2", "folder/"]) == [
        "a/x.jsonl", "b/x.csv", "y", "z.v2", "folder",
    ]  # fmt: skip


def test_what_is_named_twice_or_within_another_is_refused(two: list[str], tmp_path: Path) -> None:
    again = f"{tmp_path}/./{Path(two[0]).name}"
    for data, said in (
        ((two[0], two[0]), f"{two[0]} is named twice, name each once"),
        ((two[0], again), f"{two[0]} and {again} are the same, name it once"),
        ((two[0], str(tmp_path)), f"{two[0]} lies in {tmp_path}, whose files are all read: name one of them"),
        (("office", "office"), "office is named twice, name each once"),
        ((), "is given nothing: name at least one, such as yours.jsonl"),
    ):
        with pytest.raises(ConfigError) as error:
            check(DataConfig(data=data))
        assert str(error.value).endswith(said) and "\n" not in str(error.value)
    check(DataConfig(data=("office", *two)))


def test_a_wrong_row_is_told_with_its_own_file(two: list[str], tmp_path: Path) -> None:
    lines(tmp_path / "bad.jsonl", ROW, {"instruction": "Count."})
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2: no column `response`"):
        read([two[0], str(tmp_path / "bad.jsonl")])


def test_small_files_are_read_once_and_told_of_once(
    read_files: Counter[str], two: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines(tmp_path / "tickets.jsonl", *[ROW | {"category": "b"}] * 3)
    names = (two[0], str(tmp_path / "tickets.jsonl"))
    with caplog.at_level(logging.INFO, "smartmops.data"):
        with ahead():
            early = splits(names)
        assert caplog.messages == [], "it is said when the run reads them"
        assert splits(names) == early and len(caplog.messages) == 2
        assert read_files == {"numbers.jsonl": 1, "tickets.jsonl": 1}
        splits(names)
    assert read_files == {"numbers.jsonl": 2, "tickets.jsonl": 2}, "nothing is kept once it was handed out"


def test_files_that_changed_in_between_are_read_again(read_files: Counter[str], two: list[str]) -> None:
    with ahead():
        read(two[0])
    lines(Path(two[0]), ROW | {"response": "Two, or three."})
    assert read(two[0]) == [Example("Count.", "", "Two, or three.")] and read_files["numbers.jsonl"] == 2


def test_the_command_line_and_a_file_of_options_name_several(two: list[str], tmp_path: Path) -> None:
    def data_of(*words: str) -> Any:
        def data(config: DataConfig) -> None: ...

        return asked({"data": data}, ["data", *words])[1].data

    (tmp_path / "options.yaml").write_text(f"data: [{', '.join(two)}]\n")
    options = f"--config={tmp_path / 'options.yaml'}"
    assert data_of(*two, "--limit", "2") == data_of(options) == tuple(two)
    assert data_of(two[0]) == data_of(two[0], options) == two[0]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def train(*data: str, **options: Any) -> dict[str, Any]:
        return sm.train(model="tiny", data=list(data), out=tmp_path / "run", steps=1, batch_size=4, samples_per_task=0,
                        dtype="float32", validation_share=0.0, prompts_per_expert=2, **options)  # fmt: skip

    return train


def test_a_run_of_several_is_trained_evaluated_and_started_again(
    run: Callable[..., dict[str, Any]], read_files: Counter[str], tmp_path: Path
) -> None:
    names = [lines(tmp_path / f"{word}.jsonl", *({"instruction": f"{word} {i}", "response": word} for i in range(12)))
             for word in ("red", "blue")]  # fmt: skip
    assert list(run(*names, experts=2)["perplexity"]["per_task"]) == ["blue", "red"]
    assert read_files == {"red.jsonl": 1, "blue.jsonl": 1}, "once by early looks and the run together"
    found = sm.load_run(tmp_path / "run")
    assert found.experts == ["blue", "red"]
    assert list(found.evaluate()["perplexity"]["per_task"]) == ["blue", "red"]
    assert list(found.evaluate(data=names[:1])["perplexity"]["per_task"]) == [""]
    assert list(found.evaluate(data=names)["perplexity"]["per_task"]) == ["blue", "red"]
    assert "data `red.jsonl blue.jsonl`" in (tmp_path / "run/adapter/README.md").read_text()
    options = tmp_path / "run/config.yaml"
    again = sm.train(config=options, out=tmp_path / "again")["perplexity"]
    assert again == sm.train(config=options, out=tmp_path / "run", resume=True)["perplexity"]


def test_a_federation_reads_several_and_shares_out_the_rows_of_each(tmp_path: Path) -> None:
    names = [lines(tmp_path / f"{word}.jsonl", *({"instruction": f"{word} {i}", "response": word} for i in range(24)))
             for word in ("red", "blue")]  # fmt: skip
    done = sm.federate(model="tiny", data=names, out=tmp_path / "run", clients=2, clients_per_round=2, rounds=1,
                       local_steps=1, batch_size=4, experts=2, prompts_per_expert=2, samples_per_task=0,
                       dtype="float32")  # fmt: skip
    assert list(done["perplexity"]["per_task"]) == ["blue", "red"]
    found = sm.load_run(tmp_path / "run")
    assert found.experts == ["blue", "red"]
    assert found.evaluate()["perplexity"] == done["perplexity"]
    with pytest.raises(sm.DataError, match=r"green\.jsonl"):
        sm.federate(model="tiny", data=[*names, str(tmp_path / "green.jsonl")], out=tmp_path / "other", clients=2,
                    clients_per_round=2)  # fmt: skip


LAYOUTS: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "tasks": ({"cooking.jsonl": 2, "travel.jsonl": 3}, {"cooking": 2, "travel": 3}),
    "a task that is called like a split": ({"sales.jsonl": 2, "dev.jsonl": 3, "hr.jsonl": 1}, {"sales": 2, "dev": 3, "hr": 1}),
    "a task that begins like one": ({"cooking.jsonl": 2, "test-prep.jsonl": 3}, {"cooking": 2, "test-prep": 3}),
    "trains are not for training": ({"cooking.jsonl": 2, "train-timetables.jsonl": 3}, {"cooking": 2, "train-timetables": 3}),
    "a word within another": ({"training.jsonl": 2, "constraint.jsonl": 1, "latest.jsonl": 1}, {"": 2}),
    "capital letters": ({"cooking.jsonl": 2, "travel.JSONL": 3}, {"cooking": 2, "travel": 3}),
    "splits": ({"train.jsonl": 2, "test.jsonl": 3, "validation.jsonl": 1}, {"": 2}),
    "splits in capital letters": ({"Train.jsonl": 2, "TEST.jsonl": 3}, {"": 2}),
    "shards": ({"train-00000-of-00002.jsonl": 2, "train-00001-of-00002.jsonl": 1, "test-00000-of-00001.jsonl": 3}, {"": 3}),
    "shards with a digest": (
        {"data/train-00000-of-00002-6a5e1c1b3f0b9a4d.jsonl": 2, "data/train-00001-of-00002-0f3be1c1b3f09d4a.jsonl": 1},
        {"": 3},
    ),
    "named splits": ({"squad_train.jsonl": 2, "squad_dev.jsonl": 3, "notes.jsonl": 4}, {"": 2}),
    "a split for each task": ({"cook_train.jsonl": 2, "fly_train.jsonl": 1, "cook_test.jsonl": 3, "fly_test.jsonl": 3},
                              {"cook": 2, "fly": 1}),
    "folders": ({"train/cook.jsonl": 2, "train/fly.jsonl": 1, "test/cook.jsonl": 3}, {"cook": 2, "fly": 1}),
    "shards in folders": ({"train/part-0.jsonl": 2, "train/part-1.jsonl": 1, "test/part-0.jsonl": 3}, {"": 3}),
    "the training split and something else": ({"train.jsonl": 2, "labels.jsonl": 3}, {"": 2}),
    "held out alone": ({"test.jsonl": 2, "dev.jsonl": 3}, {"": 5}),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_names_in_a_folder_say(layout: str, tmp_path: Path) -> None:
    files, wanted = LAYOUTS[layout]
    for name, count in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(
            "".join(f'{{"instruction": "{name} {i}", "response": "r"}}\n' for i in range(count))
        )
    assert Counter(example.category for example in read(tmp_path)) == wanted


def test_files_that_are_not_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train.jsonl", "test.jsonl", "labels.jsonl"):
        (tmp_path / name).write_text('{"instruction": "i", "response": "r"}\n')
    with caplog.at_level("INFO"):
        read(tmp_path)
    assert "2 files beside the training split are not read (labels.jsonl, test.jsonl)" in caplog.text


def test_files_of_other_forms_are_named_but_for_what_people_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.ndjson", "notes.txt", "more.zip", "README.md", "LICENSE", "dataset_info.json", ".hidden.bin"):
        (tmp_path / name).write_text('{"instruction": "i", "response": "r"}\n')
    assert [example.category for example in read(tmp_path)] == ["a"], "JSON lines, as some call them"
    assert f"{tmp_path}: 2 files of other forms are not read (more.zip, notes.txt)" in caplog.messages


def test_linked_folders_are_read_once_and_hidden_ones_never(tmp_path: Path) -> None:
    for name in ("far/cooking.jsonl", "data/travel.jsonl", "data/sub/.ipynb_checkpoints/travel-checkpoint.jsonl"):
        lines(tmp_path / name, ROW)
    (tmp_path / "data/linked").symlink_to(tmp_path / "far", target_is_directory=True)
    (tmp_path / "data/sub/circle").symlink_to(tmp_path / "data", target_is_directory=True)
    assert sorted(example.category for example in read(tmp_path / "data")) == ["cooking", "travel"]
    (tmp_path / "data/gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"gone\.jsonl cannot be read .No such file"):
        read(tmp_path / "data")


def test_task_files_and_rows_in_one_folder_are_not_half_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "task1.json").write_text(
        json.dumps({"Definition": "Do.", "Instances": [{"input": "i", "output": "o"}]})
    )
    lines(tmp_path / "deep/a.jsonl", ROW)
    with pytest.raises(DataError, match=r"and data of other forms \(deep/a.jsonl\), which are not read together"):
        read(tmp_path)
    (tmp_path / "deep/a.jsonl").rename(tmp_path / "deep/a.bak")
    (tmp_path / "raw.csv").write_text("LJ001|what the task was made of\n")
    assert [example.category for example in read(tmp_path)] == ["task1"]
    assert f"{tmp_path}: 2 files of other forms are not read (deep/a.bak, raw.csv)" in caplog.messages


@pytest.mark.parametrize("name", ["more.jsonl.gz", "more.csv.zip", "deep/more.JSON.zst"])
def test_a_compressed_file_is_not_passed_over(tmp_path: Path, name: str) -> None:
    (tmp_path / "cooking.jsonl").write_text('{"instruction": "i", "response": "r"}\n')
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match=f"holds {name}, which is compressed: unpack it, or take it out of the folder"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.JSONL", "a.Json", "a.CSV", "a.TSV", "a.PARQUET"])
def test_a_form_in_capital_letters_is_a_form(tmp_path: Path, name: str) -> None:
    frame, file = pandas.DataFrame([{"instruction": "i", "response": "02116"}] * 2), tmp_path / name
    if name.lower().endswith("parquet"):
        frame.to_parquet(file)
    elif name.lower().endswith("sv"):
        frame.to_csv(file, index=False, sep="," if "C" in name else "\t")
    else:
        frame.to_json(file, orient="records", lines=name.endswith("L"))
    assert [example.response for example in read(file)] == ["02116"] * 2


@pytest.mark.parametrize(("files", "tasks", "said"), [
    (("en/qa", "de/qa"), {"de-qa", "en-qa"}, "de/qa.jsonl and en/qa.jsonl are called alike"),
    (("en/qa", "de/qa", "de/chat"), {"de-qa", "en-qa", "chat"}, "de/qa.jsonl and en/qa.jsonl are called alike"),
    (("qa", "de/qa"), {"qa", "de-qa"}, "de/qa.jsonl and qa.jsonl are called alike"),
    (("en/train", "de/train"), {"en", "de"}, "de/train.jsonl and en/train.jsonl are called alike"),
    (("en/qa/train", "de/qa/train"), {"en-qa", "de-qa"}, "de/qa/train.jsonl and en/qa/train.jsonl are called alike"),
    (("train/qa", "test/qa", "train/chat"), {"qa", "chat"}, ""),
    (("train/qa-00001-of-00002", "train/qa-00002-of-00002", "train/chat"), {"qa", "chat"}, ""),
    (("train-00001-of-00002", "train-00002-of-00002"), {""}, ""),
    (("en/qa", "de/chat"), {"qa", "chat"}, ""),
])  # fmt: skip
def test_files_of_several_folders_that_are_called_alike_are_tasks_of_their_own(
    files: Sequence[str], tasks: set[str], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "smartmops.data")
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        lines(tmp_path / f"{name}.jsonl", ROW)
    assert {example.category for example in read(tmp_path)} == tasks
    assert said in caplog.text and bool(said) == ("called alike" in caplog.text)


def test_tasks_that_no_name_tells_apart_are_refused(tmp_path: Path) -> None:
    for name in ("en/qa", "de/qa", "en-qa"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        lines(tmp_path / f"{name}.jsonl", ROW)
    with pytest.raises(DataError, match=r"en/qa.jsonl and en-qa.jsonl would both be task 'en-qa': rename one"):
        read(tmp_path)
