"""What is shown of data is what would be trained on: parts, tokens, repeated texts, what is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from smartmops.analysis.preview import preview, repeated
from smartmops.cli import data_command
from smartmops.data.tasks import splits
from smartmops.options.finished.reading import DataConfig
from smartmops.rows.example import Example
from smartmops.tiny import BASE


def rows() -> list[dict[str, str]]:
    """Thirty of each of two tasks, one of them with a context that is too long."""
    return [
        {"instruction": f"{task} number {i}", "context": "word " * 400 if (task, i) == ("sort", 3) else "",
         "response": f"answer {i}", "category": task}
        for task in ("sort", "count") for i in range(30)
    ]  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found = tmp_path / "rows.jsonl"
    found.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return found


def test_parts_are_those_of_training(file: Path) -> None:
    found = preview(DataConfig(data=str(file)))
    train, test = splits(file)
    assert found["examples"]["train"] + found["examples"]["validation"] == len(train)
    assert found["examples"]["test"] == len(test)
    assert found["tasks"]["sort"] == {"train": 24, "validation": 3, "test": 3}
    assert "tokens" not in found and "rendered" not in found, "nobody named a model"


def test_tokens_are_the_tokenizers_and_what_is_cut_is_counted(file: Path) -> None:
    found = preview(DataConfig(data=str(file), model="tiny", max_length=64, shown=3))
    assert found["max_length"] == 64
    tokens = found["tokens"]
    assert tokens["sort"]["shortened"] == 1 and tokens["count"]["shortened"] == 0
    assert tokens["sort"]["longest"] == 64 and tokens["sort"]["dropped"] == 0
    assert [each["task"] for each in found["rendered"]] == ["sort", "count", "sort"], "one of each task first"
    tokenizer: Any = AutoTokenizer.from_pretrained(BASE)
    for each in found["rendered"]:
        assert each["answer"].startswith("answer ") and each["answer"].endswith(tokenizer.eos_token)
        assert each["prompt"].count(f"{each['task']} number") == 1 and "answer" not in each["prompt"]


def test_texts_that_spell_control_tokens_are_counted(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(BASE)
    file.write_text(file.read_text().replace("answer 5", f"answer {tokenizer.eos_token} 5"))
    found = data_command(DataConfig(data=str(file), model="tiny"))["controls"]
    assert sum(int(said.split()[1]) for said in found) == 2
    assert all(f"examples spell control tokens of this model ({tokenizer.eos_token})" in said for said in found)
    assert found[0] in " ".join(capsys.readouterr().out.split())


def test_rows_that_do_not_fit_are_counted_and_none_at_all_is_an_error(file: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(file.read_text() + json.dumps({**rows()[0], "response": "word " * 100}) + "\n")
    found = preview(DataConfig(data=str(long), model="tiny", max_length=64, test_share=0.02, validation_share=0))
    assert sum(each["dropped"] for each in found["tokens"].values()) == 1
    assert found["lost"] == []
    said = rf"{file.name}, train: \d+ of \d+ rows are too long for --max-length 4 .*choose --max-length \d+"
    with pytest.raises(ValueError, match=said):
        preview(DataConfig(data=str(file), model="tiny", max_length=4))


def test_a_source_and_a_task_that_are_gone_are_told(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = [{"instruction": f"Tell {i}", "response": "word " * 100, "category": "tales", "source": "grimm"}
            for i in range(2)]  # fmt: skip
    (tmp_path / "long.jsonl").write_text(file.read_text() + "".join(json.dumps(row) + "\n" for row in long))
    found = data_command(DataConfig(data=str(tmp_path / "long.jsonl"), model="tiny", max_length=64, validation_share=0))
    assert [each.partition(": ")[2].partition(": ")[0] for each in found["lost"]] == [
        "nothing is left of task 'tales'", "nothing is left of task 'tales'", "nothing is left of source 'grimm'",
    ]  # fmt: skip
    told = " ".join(capsys.readouterr().out.split())
    assert "nothing is left of source 'grimm': 2 of 2 rows are too long for --max-length 64" in told


def test_what_stands_twice_is_found_without_regard_to_case_and_space() -> None:
    parts = {
        "train": [Example("Add 1 and 2", "", "3", "sum"), Example("add 1  and 2 ", "", "3", "sum"),
                  Example("ADD 1 AND 2", "", "three", "sum"), Example("Add 1 and 2", "in base 2", "11", "sum")],
        "validation": [Example("Add 2 and 2", "", "4", "sum")],
        "test": [Example("add 1 and 2", "", "4", "sum"), Example("Add 1 and 2", "in words", "three", "sum")],
    }  # fmt: skip
    found = repeated(parts)
    assert {name: found[name] for name in ("train", "answers", "validation", "test")} == {
        "train": 1, "answers": 3, "validation": 0, "test": 1,
    }  # fmt: skip
    assert found["shown"] == [{"part": "test", "task": "sum", "text": "add 1 and 2"}]


def test_earlier_turns_and_the_systems_words_belong_to_a_question() -> None:
    first = Example("And then?", "", "Home.", history=(("Where to?", "Out."),), system="Be short.")
    others = [Example("And then?", "", "Home."), Example("And then?", "", "Home.", history=first.history)]
    found = repeated({"train": [first], "validation": [], "test": others})
    assert found["test"] == 0


def test_the_command_prints_counts_and_marks_what_is_trained_on(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = data_command(DataConfig(data=str(file), model="tiny", shown=1))
    printed = capsys.readouterr().out
    assert found["examples"]["test"] == 6
    assert f"⟦{found['rendered'][0]['answer']}⟧" in printed
    assert "questions also trained on: 0 of the test split" in " ".join(printed.split())
