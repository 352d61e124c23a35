"""The forms that data come in: the same examples from JSONL, JSON, CSV, TSV and Parquet, and what each bad row says."""

from __future__ import annotations

import csv
import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from smartmops.checks.errors import DataError
from smartmops.data.tasks import DOLLY_TASKS, GENERAL_QA, read, split, splits
from smartmops.rows.conversations import conversations
from smartmops.rows.example import Example

Rows = Sequence[Mapping[str, Any]]
SAID = [("user", "Who?"), ("assistant", "Ada."), ("user", "Why?"), ("assistant", "Notes.")]
TALK = [
    Example("Who?", "", "Ada.", "names", "", "Be brief."),
    Example("Why?", "", "Notes.", "names", "", "Be brief.", (("Who?", "Ada."),)),
]
OPENAI = [{"role": "system", "content": "Be brief."}, *({"role": who, "content": text} for who, text in SAID)]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[who], "value": text} for who, text in SAID]
ONE = [Example("Add.", "2 and 3", "05", "sums"), Example("Say it.", "", "NA", "words")]


def texts(asked: str, given: str, answered: str, task: str) -> Rows:
    return [dict(zip((asked, given, answered, task), (e.instruction, e.context, e.response, e.category), strict=True))
            for e in ONE]  # fmt: skip


FORMS: dict[str, tuple[Rows, list[Example]]] = {
    "our own": (texts("instruction", "context", "response", "category"), ONE),
    "alpaca": (texts("instruction", "input", "output", "task"), ONE),
    "prompt": (texts("prompt", "context", "completion", "category"), ONE),
    "superni": (texts("definition", "inputs", "targets", "task_name"), ONE),
    "messages": ([{"messages": OPENAI, "category": "names"}], TALK),
    "sharegpt": ([{"conversations": SHAREGPT, "system": "Be brief.", "task": "names"}], TALK),
    "mixed names": ([{"conversations": OPENAI, "category": "names"}], TALK),
    "talk of trl": ([{"prompt": OPENAI[:4], "completion": OPENAI[4:], "category": "names"}], TALK[1:]),
    "history": ([{"instruction": "Why?", "input": "", "output": "Notes.", "system": "Be brief.",
                  "history": [["Who?", "Ada."]], "category": "names"}], TALK[1:]),
}  # fmt: skip
LISTS = ("messages", "sharegpt", "mixed names", "talk of trl", "history")


def write(file: Path, rows: Rows) -> Path:
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows, indent=1))
    elif file.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist([dict(row) for row in rows]), file)
    else:
        with open(file, "w", newline="") as stream:
            cells = csv.DictWriter(stream, list(rows[0]), delimiter="," if file.suffix == ".csv" else "\t")
            cells.writeheader()
            cells.writerows(
                {name: v if isinstance(v, str) else json.dumps(v) for name, v in row.items()} for row in rows
            )
    return file


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_every_file(tmp_path: Path, form: str, suffix: str) -> None:
    rows, expected = FORMS[form]
    file = write(tmp_path / f"a{suffix}", rows)
    if form in LISTS and suffix in (".csv", ".tsv"):
        with pytest.raises(ValueError, match=r"line 2: `.*` (is|are) .*so write such data as JSONL"):
            read(file)
    else:
        assert read(file) == expected


def test_parts_of_text_and_other_names_of_roles(tmp_path: Path) -> None:
    said = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Who?"}]},
            {"role": "model", "content": "Ada."}]  # fmt: skip
    assert read(write(tmp_path / "a.jsonl", [{"messages": said}])) == [Example("Who?", "", "Ada.", system="Be brief.")]


@pytest.mark.parametrize(("rows", "columns", "tasks", "said"), [
    ([{"category": "a", "task": "b"}], (), ["a"],
     "column `category`, `task` is not read (--columns category=task takes it in place of `category`)"),
    ([{"category": "a", "task": "b"}], ("category=task",), ["b"], "column `task`"),
    ([{"category": "a", "task": "a"}], (), ["a"], "column `category`"),
    ([{"category": None, "task": "b"}, {"category": "a", "task": "b"}], (), ["b", "b"],
     "column `task`, `category` is not read (--columns category=category takes it in place of `task`)"),
    ([{"task": 1, "task_name": "b"}], (), ["1"],
     "column `task`, `task_name` is not read (--columns category=task_name takes it in place of `task`)"),
    ([{"category": "a", "source": "x", "client": "y"}], (), ["a"],
     "column `category`, `client` is not read (--columns source=client takes it in place of `source`)"),
    ([{"task": "t"}, {"category": "c"}], (), ["t", "c"], "columns `task` and `category`"),
    ([{"task": "t", "category": None}, {"category": "c", "task": None}], (), ["t", "c"],
     "columns `task` and `category`"),
    ([{"category": "a", "task": "b"}, {"category": "", "task": "c"}], (), ["a", "c"], "columns `category` and `task`, "
     "`task` is not read in all rows (--columns category=task takes it in place of `category`)"),
    ([{"category": "a", "task": ["x", "y"]}, {"category": "b", "task": 0.5}], (), ["a", "b"], "column `category`"),
    ([{"category": "a", "source": "s", "client": {"id": 1}}], (), ["a"], "column `category`"),
    ([{"task": "t"}, {"category": ["x"], "task": "u"}], (), ["t", "u"], "column `task`"),
])  # fmt: skip
def test_of_two_columns_that_say_different_things_the_one_that_is_read_is_named(
    rows: list[dict[str, Any]], columns: Sequence[str], tasks: list[str], said: str, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, "smartmops.data")
    lines = [json.dumps({"instruction": "x", "response": "y"} | row) + "\n" for row in rows]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    assert [example.category for example in read(tmp_path / "a.jsonl", columns=columns)] == tasks
    assert f"rows, tasks from {said}\n" in caplog.text


def test_a_row_that_is_left_out_does_not_say_where_tasks_come_from(tmp_path: Path) -> None:
    rows = [{"response": "", "task": "b"}, {"category": "a", "task": "c"}]
    found = read(write(tmp_path / "a.parquet", [{"instruction": "x", "response": "y", "category": None} | row
                                                for row in rows]))  # fmt: skip
    assert [example.category for example in found] == ["a"]


def test_what_alone_may_name_a_task_is_text(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"instruction": "x", "response": "y", "category": None, "task": ["b"]}])
    with pytest.raises(DataError, match=r"line 1: `task` is .*, not text: write it in quotes"):
        read(file)


def test_form_is_said_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "smartmops.data")
    read(write(tmp_path / "a.jsonl", FORMS["sharegpt"][0]))
    read(write(tmp_path / "b.csv", FORMS["alpaca"][0]))
    assert "a.jsonl: 2 examples from chat rows, tasks from column `task`" in caplog.text
    assert "b.csv: 2 examples from Alpaca rows, tasks from column `task`" in caplog.text


# --------------------------------------------------------------------------------------------------- names of columns
def test_columns_of_other_names(tmp_path: Path) -> None:
    rows = [{"q": e.instruction, "context": "not this", "ctx": e.context, "a": e.response, "label": e.category, "id": 3}
            for e in ONE]  # fmt: skip
    names = ("instruction=q", "context=ctx", "response=a", "task=label")
    for suffix in (".jsonl", ".json", ".parquet", ".csv"):
        file = write(tmp_path / f"a{suffix}", rows)
        assert read(file, columns=names) == ONE
    train, test = splits(file, columns=names, folder=tmp_path / "rows")
    assert sorted([*train, *test], key=lambda e: e.category) == ONE
    chat = write(tmp_path / "chat.jsonl", [{"talk": OPENAI, "instruction": "i", "response": "r", "category": "names"}])
    assert read(chat, columns=["messages=talk"]) == TALK
    assert [e.response for e in read(chat)] == ["r"]


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["response"], "--columns response: write FIELD=COLUMN"),
        (["answer=a"], "--columns answer=a: .*FIELD is one of instruction, context, response"),
        (["response="], "--columns response=: write"),
        (["response=a", "response=b"], "--columns response=b: response is read from a already: choose one"),
        (["response=c"], r"a\.jsonl, line 1: --columns response=c: no such column \(found: q, a\)"),
        (["response=a"], "line 1: no column `instruction`"),
    ],
)
def test_names_that_cannot_be(tmp_path: Path, names: list[str], problem: str) -> None:
    file = write(tmp_path / "a.jsonl", [{"q": "?", "a": "!"}])
    with pytest.raises(ValueError, match=problem):
        read(file, columns=names)


def test_built_in_data_have_columns_of_their_own() -> None:
    with pytest.raises(ValueError, match="--columns response=a: office has columns of its own"):
        read("office", columns=["response=a"])


# ---------------------------------------------------------------------------------------------------------- bad rows
def chat(*said: object) -> dict[str, object]:
    return {"messages": list(said)}


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (chat({"role": "user", "content": "a"}), r"ends with the user \('a'\)"),
        (chat({"role": "user"}), "message 1 of `messages` has content=null, not text"),
        (chat({"content": "a"}), "message 1 of `messages` has null for a role: choose system, user or assistant"),
        (chat({"role": ["user"], "content": "a"}), r'has \["user"\] for a role'),
        (chat({"role": "tool", "content": "a"}), "message 1 has role='tool': choose one of system, user, assistant"),
        (chat({"role": "user", "content": [{"type": "image_url"}]}), "has content=.*only text is read"),
        (chat("hello"), 'message 1 of `messages` is "hello", no object with role and content'),
        (chat(), "0 messages, and none of a user"),
        ({"messages": {"role": "user"}}, "`messages` is .*, not a list of messages: write"),
        ({"messages": '[{"role": "user"}]'}, "`messages` is text, not a list of messages: .* JSONL, JSON or Parquet"),
        ({"messages": None}, "`messages` is null, not a list"),
        ({"text": "a"}, r"`messages` is null, not a list|no column `messages` \(found: text\)"),
        (
            chat({"role": "user", "content": "half \ud83d"}, {"role": "assistant", "content": "b"}),
            r"`instruction` holds \\ud83d",
        ),
        (chat(*OPENAI) | {"category": 2.5}, "give every row a category, or none"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_bad_chat_is_named(tmp_path: Path, suffix: str, bad: Mapping[str, Any], problem: str) -> None:
    file = write(tmp_path / f"a{suffix}", [chat(*OPENAI), bad, chat(*OPENAI)])
    with pytest.raises(ValueError, match=rf"a{suffix}, line \d+: .*({problem})") as found:
        read(file)
    assert "\n" not in str(found.value) and len(str(found.value)) < 600
    if suffix == ".jsonl":
        assert "line 2: " in str(found.value)


@pytest.mark.parametrize("history", ["a", [["a"]], [["a", 3]], [["a", "b", "c"]], {"a": "b"}])
def test_a_bad_history_is_named(tmp_path: Path, history: object) -> None:
    file = write(tmp_path / "a.jsonl", [{"instruction": "i", "output": "o", "history": history}])
    with pytest.raises(ValueError, match=r"line 1: `history` is .*, no list of pairs"):
        read(file)


# ----------------------------------------------------------------------------------------------------- conversations
def test_turns_of_one_conversation_stay_on_one_side(tmp_path: Path) -> None:
    rows = []
    for number in range(40):
        said = [(who, f"{number} {text}") for who, text in SAID * (1 + number % 3)]
        rows.append({"messages": [{"role": who, "content": text} for who, text in said], "category": "ab"[number % 2]})
    for limit in (None, 60):
        for seed in range(3):
            train, test = splits(write(tmp_path / "a.jsonl", rows), limit, 0.2, seed)
            sides = [{example.response.split()[0] for example in part} for part in (train, test)]
            assert not sides[0] & sides[1] and len(train) + len(test) == (limit or 158)
            assert {example.category for example in test} == {"a", "b"}


def test_equal_questions_are_no_conversation() -> None:
    alike = [Example("Who?", "", "Ada.")] * 10
    assert [len(part) for part in split(alike)] == [9, 1]


@pytest.mark.parametrize("seed", range(4))
def test_turns_that_were_written_out_and_shuffled_stay_on_one_side_too(seed: int) -> None:
    rows = []
    for number in range(30):
        said = [(f"{number} q{turn}", f"{number} a{turn}") for turn in range(1 + number % 4)]
        rows += [Example(user, "", answer, history=tuple(said[:turn])) for turn, (user, answer) in enumerate(said)]
    random.Random(seed).shuffle(rows)
    train, test = split(rows, 0.2, seed)
    sides = [{example.response.split()[0] for example in part} for part in (train, test)]
    assert not sides[0] & sides[1] and len(train) + len(test) == len(rows) and len(sides[1]) == 6


def test_many_conversations_that_begin_alike_are_many() -> None:
    rows = []
    for number in range(20):
        rows += [Example("Hi", "", "Hello!"), Example(f"Ask {number}", "", "Yes.", history=(("Hi", "Hello!"),))]
    assert list(map(len, conversations(rows)[""])) == [2] * 20


@pytest.mark.parametrize(("field", "value"), [("weight", 0), ("loss", False), ("train", False)])
def test_a_turn_that_is_not_to_be_learnt_is_read_alone(tmp_path: Path, field: str, value: Any) -> None:
    turns = [("user", "q1"), ("assistant", "BAD"), ("user", "q2"), ("assistant", "GOOD")]
    messages: list[dict[str, Any]] = [{"role": who, "content": text, "weight": None} for who, text in turns]
    messages[1][field], messages[3][field] = value, not value
    good = Example("q2", "", "GOOD", history=(("q1", "BAD"),))
    assert read(write(tmp_path / "a.jsonl", [{"messages": messages}])) == [good]
    messages[3][field] = value
    with pytest.raises(DataError, match="`messages` has no turn of the assistant that is to be learnt"):
        read(write(tmp_path / "b.jsonl", [{"messages": messages}]))
    messages[3][field] = 0.5
    with pytest.raises(DataError, match=f"message 4 of `messages` has {field}=0.5: write 1 .or true. to learn it, 0"):
        read(write(tmp_path / "c.jsonl", [{"messages": messages}]))


@pytest.mark.parametrize("field", ["tool_calls", "function_call"])
def test_calls_of_tools_are_not_dropped(tmp_path: Path, field: str) -> None:
    asked, answered = {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "Let me look."}
    for number, nothing in enumerate((None, [], {})):
        rows = [{"messages": [asked, answered | {field: nothing}]}]
        assert len(read(write(tmp_path / f"{number}.jsonl", rows))) == 1
    with pytest.raises(
        DataError, match=f"message 2 of `messages` has {field}, and calls are not read: write the call as"
    ):
        read(write(tmp_path / "a.jsonl", [{"messages": [asked, answered | {field: [{"name": "weather"}]}]}]))


def test_one_of_two_contexts_is_not_dropped(tmp_path: Path) -> None:
    row = {"instruction": "Translate.", "context": "to French", "input": "Good morning", "response": "Bonjour"}
    with pytest.raises(DataError, match="`context` and `input` both say something, and one is the context: join them"):
        read(write(tmp_path / "a.jsonl", [row]))
    assert read(write(tmp_path / "b.jsonl", [row | {"context": ""}]))[0].context == "Good morning"
    assert read(tmp_path / "a.jsonl", columns=["context=input"])[0].context == "Good morning"
    alpaca = {"instruction": "Translate.", "input": "", "context": "Good evening", "output": "Bonsoir"}
    assert read(write(tmp_path / "c.jsonl", [alpaca]))[0].context == "Good evening"


def test_one_of_two_answers_is_not_dropped(tmp_path: Path) -> None:
    row = {"instruction": "Say it.", "response": "A", "output": "B"}
    said = "`response` and `output` both hold an answer, and not the same: leave one out, or name the right one by"
    with pytest.raises(DataError, match=f"{said} --columns response=response or response=output"):
        read(write(tmp_path / "a.jsonl", [row]))
    for chosen, answer in (("response", "A"), ("output", "B")):
        assert read(tmp_path / "a.jsonl", columns=[f"response={chosen}"])[0].response == answer
    for other in ("A ", "", None):
        assert read(write(tmp_path / "b.jsonl", [row | {"output": other}]))[0].response == "A"
    chat = {"messages": OPENAI, "instruction": "Who?", "response": "Bob."}
    with pytest.raises(
        DataError, match=r"`messages` and `response` both hold .*messages=messages or response=response"
    ):
        read(write(tmp_path / "c.jsonl", [chat]))
    assert read(write(tmp_path / "d.jsonl", [chat | {"response": "Ada."}])) == [replace(e, category="") for e in TALK]
    assert read(tmp_path / "c.jsonl", columns=["response=response"])[0].response == "Bob."


@pytest.mark.parametrize("field", ["reasoning_content", "tools"])
def test_thoughts_and_tools_of_a_chat_are_not_dropped(tmp_path: Path, field: str) -> None:
    def row(value: Any) -> Mapping[str, Any]:
        answer = {"role": "assistant", "content": "Ada."} | ({} if field == "tools" else {field: value})
        return {"messages": [OPENAI[1], answer]} | ({field: value} if field == "tools" else {})

    assert len(read(write(tmp_path / "a.jsonl", [row(None), row("")]))) == 2
    with pytest.raises(DataError, match=f"{field}`?, and .* are not read"):
        read(write(tmp_path / "b.jsonl", [row("look it up")]))


@pytest.mark.parametrize("blank", [None, "", "  "])
def test_a_category_without_a_name_is_no_task(tmp_path: Path, blank: Any) -> None:
    rows = [{"instruction": f"Say {i}.", "response": "x", "category": "b" if i % 3 else blank} for i in range(9)]
    file = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"3 of 9 examples have no category, or an empty one \(example 1: 'Say 0.'\)"):
        read(file)
    assert {each.category for each in read([str(file), "office"]) if each.source == "a"} == {"a", "b"}, (
        "the file's name"
    )


def test_only_dollys_own_data_lose_its_eighth_category(tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {i}.", "response": "x", "category": name}
            for i, name in enumerate((*DOLLY_TASKS, GENERAL_QA))]  # fmt: skip
    assert len(read(write(tmp_path / "all.jsonl", rows))) == 7
    for number, own in enumerate((rows[-1:], rows[-2:], rows[:1] + rows[-1:])):
        assert len(read(write(tmp_path / f"{number}.jsonl", own))) == len(own)
