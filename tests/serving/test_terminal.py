"""`generate` and `chat` as they are typed, on a run of two tasks."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from smartmops import cli
from smartmops.checks.errors import DataError
from smartmops.data.asked import read_rows
from smartmops.options.finished.serving import ChatConfig, GenerateConfig
from smartmops.rows.example import Example
from smartmops.serving import terminal
from smartmops.serving.answering import Answer, Answerer, Settings
from smartmops.serving.terminal import by, chat, generate

ROWS = [{"instruction": "apple number 3.", "id": 7}, {"instruction": "banana number 4.", "context": "A long text."},
        {"instruction": "Something else, which is much longer than the others."}]  # fmt: skip


@pytest.fixture(autouse=True)
def loaded(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is loaded once for all tests."""
    monkeypatch.setattr(Answerer, "open", lambda path: answerer)


def typed(line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr("sys.argv", ["smartmops", *line])
    cli.main()
    return capsys.readouterr().out


def alone(answerer: Answerer, row: dict[str, str], **who: object) -> str:
    example = Example(row["instruction"], row.get("context", ""), "")
    return answerer.answer([answerer.ask(example, Settings(6), **who)])[0].text


def test_one_answer_is_followed_by_who_gave_it(
    run: Path, answerer: Answerer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["generate", str(run), ROWS[0]["instruction"], "--max-new-tokens", "6"]
    for more, who, said in ((["--expert", "banana"], {"expert": "banana"}, "[banana 1.00]"),
                            (["--base"], {"base": True}, "[left to the base 1.00]")):  # fmt: skip
        printed = typed([*line, *more], monkeypatch, capsys)
        assert printed == f"{alone(answerer, ROWS[0], **who)}\n{said}\n"
    printed = typed(line, monkeypatch, capsys)
    assert printed.startswith(alone(answerer, ROWS[0])) and printed.count("[") >= 1


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_a_file_is_answered_row_by_row_whatever_the_batch(
    run: Path, answerer: Answerer, tmp_path: Path, batch: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    line = ["generate", str(run), "--file", str(file), "--max-new-tokens", "6", "--batch-size", str(batch)]
    found = [json.loads(each) for each in typed(line, monkeypatch, capsys).splitlines()]
    assert [row["answer"] for row in found] == [alone(answerer, row) for row in ROWS]
    assert [{name: row[name] for name in own} for row, own in zip(found, ROWS, strict=True)] == ROWS
    assert all(sum(row["experts"].values()) + row["left_to_base"] == pytest.approx(1, abs=1e-3) for row in found)
    assert typed([*line, "--out", str(tmp_path / "new" / "out.jsonl")], monkeypatch, capsys) == ""
    assert [json.loads(each) for each in (tmp_path / "new" / "out.jsonl").read_text().splitlines()] == found


def test_a_file_of_answers_is_replaced_whole_and_what_was_answered_is_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    out.write_text("earlier answers\n")
    (tmp_path / "link.jsonl").symlink_to(out)
    line = ["generate", str(run), "--file", str(file), "--max-new-tokens", "2", "--batch-size", "1", "--out"]
    partial, whole = tmp_path / "out.jsonl.partial", terminal.each_answered

    def stopped(*given: Any) -> Iterator[dict[str, Any]]:
        assert out.read_text() == "earlier answers\n"
        yield from islice(whole(*given), 2)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(terminal, "each_answered", stopped)
    with pytest.raises(SystemExit):
        typed([*line, str(tmp_path / "link.jsonl")], monkeypatch, capsys)
    assert "free some disk space" in capsys.readouterr().err
    assert out.read_text() == "earlier answers\n"
    assert [json.loads(each)["instruction"] for each in partial.read_text().splitlines()] == [
        row["instruction"] for row in ROWS[:2]]  # fmt: skip
    monkeypatch.setattr(terminal, "each_answered", whole)
    with pytest.raises(SystemExit):
        typed([*line, str(out)], monkeypatch, capsys)
    said = f"{partial} holds the answers of a command that was broken off: move it away, or delete it, unless one"
    assert said in capsys.readouterr().err
    partial.unlink()
    typed([*line, str(tmp_path / "link.jsonl")], monkeypatch, capsys)
    assert len(out.read_text().splitlines()) == len(ROWS) and (tmp_path / "link.jsonl").is_symlink()
    assert not partial.exists()
    typed([*line, os.devnull], monkeypatch, capsys)
    assert not Path(os.devnull).is_file()


def test_a_file_asks_what_training_would_read(run: Path, answerer: Answerer, tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "apple number 1."},
             {"role": "assistant", "content": "AAA"}, {"role": "user", "content": "banana number 2."}]  # fmt: skip
    rows = [{"instruction": "banana number 4.", "input": "A long text."}, {"prompt": "apple number 3."},
            {"instruction": "banana number 2.", "system": "Be brief.", "history": [["apple number 1.", "AAA"]]},
            {"messages": turns, "id": 5},
            {"conversations": [{"from": "human", "value": "apple number 3."}]}]  # fmt: skip
    behind = Example("banana number 2.", "", "", system="Be brief.", history=(("apple number 1.", "AAA"),))
    asked = [Example("banana number 4.", "A long text.", ""), Example("apple number 3.", "", ""), behind, behind,
             Example("apple number 3.", "", "")]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [question for _, question in read_rows(file)] == asked
    found = generate(GenerateConfig(run=run, file=file, max_new_tokens=6), io.StringIO().write)
    for row, example in zip(found, asked, strict=True):
        assert row["answer"] == answerer.answer([answerer.ask(example, Settings(6))])[0].text
    assert found[3]["id"] == 5 and found[3]["messages"] == turns


@pytest.mark.parametrize(("row", "said"), [
    ({"instruction": "a", "answer": "b"}, "`answer` is what the answer is written to: call that column otherwise"),
    ({"instruction": "a", "experts": {}}, "`experts` is what the answer is written to"),
    ({"instruction": "a", "context": "b", "input": "c"}, "`context` and `input` both say something"),
    ({"instruction": "a", "input": 5}, "`input` is 5: give a text or leave it out"),
    ({"instruction": "a", "history": "b"}, "`history` is \"b\", no list of pairs"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "ends with the assistant"),
    ({"messages": []}, "none of a user"),
    ({"instruction": "a", "prompt": "b"}, "`instruction` and `prompt` both ask something, and not the same"),
    ({"messages": [{"role": "user", "content": "a"}], "prompt": "b"}, "`messages` and `prompt` both ask something"),
    ({"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "a chat with `tools`, and calls are not read"),
    ({"question": "a"}, "`instruction` is null: give a text"),
])  # fmt: skip
def test_a_row_that_would_be_answered_otherwise_than_asked_is_named(tmp_path: Path, row: object, said: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "fine"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 2: .*{said}"):
        read_rows(tmp_path / "rows.jsonl")


def test_it_is_one_importable_function(run: Path) -> None:
    out = io.StringIO()
    (found,) = generate(GenerateConfig(run=run, text="apple", max_new_tokens=3), out.write)
    assert out.getvalue().startswith(found["answer"]) and set(found["experts"]) == {"apple", "banana"}


def test_a_chat_remembers_its_turns_and_changes_who_answers(run: Path, answerer: Answerer) -> None:
    lines = ["apple number 3.", "And more?", "/expert banana", "And more?", "/new", "apple number 3.", "/base",
             "apple number 3.", "/auto", "/expert pear", "/what", "", "/quit", "never heard"]  # fmt: skip
    out = io.StringIO()
    chat(ChatConfig(run=run, max_new_tokens=6), io.StringIO("\n".join(lines) + "\n"), out.write)
    said = out.getvalue()

    def told(text: str, history: tuple[tuple[str, str], ...] = (), **who: object) -> str:
        asked = answerer.ask(Example(text, "", "", history=history), Settings(6), **who)
        return answerer.answer([asked])[0].text

    first = told(lines[0])
    second = told(lines[1], ((lines[0], first),))
    third = told(lines[3], ((lines[0], first), (lines[1], second)), expert="banana")
    after = told(lines[5], expert="banana")
    for text in (first, second, third, after):
        assert f"{text}\n[" in said
    assert said.count("[banana 1.00]") == 2 and said.count("[left to the base 1.00]") == 1
    assert "[pear is no expert of this run: choose apple, banana]" in said and "[/what is no command:" in said
    assert said.startswith("[experts: apple, banana; /expert NAME, /auto, /base, /new, /quit]\n")


def test_a_chat_ends_with_its_input_and_a_turn_too_long_is_told(run: Path) -> None:
    out = io.StringIO()
    chat(ChatConfig(run=run, max_new_tokens=2), io.StringIO("word " * 300 + "\n/new\napple"), out.write)
    assert "positions none is left to answer: shorten it; or begin anew with /new]" in out.getvalue()
    assert out.getvalue().rstrip().splitlines()[-1].startswith("[")


def test_who_answered_is_said_strongest_first_without_trifles() -> None:
    answer = Answer("", 1, "stop", {"a": 0.2, "b": 0.7, "c": 0.001}, 0.1)
    assert by(answer) == "b 0.70, a 0.20, left to the base 0.10"
    assert by(Answer("", 1, "stop", {}, 1.0)) == "left to the base 1.00"
