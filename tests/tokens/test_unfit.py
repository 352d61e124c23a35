"""What is gone where rows are too long: tasks of a part, and sources of a whole data set, with counts and a way out."""

from __future__ import annotations

from smartmops.rows.example import Example
from smartmops.tokens.unfit import Left, Limit, Lost


def rows(*labels: tuple[str, str]) -> list[Example]:
    return [Example("Go.", "", "Gone.", task, source) for task, source in labels]


def test_a_source_whose_only_rows_are_too_long_test_rows_is_named_with_data_and_count() -> None:
    parts = {
        "train": (rows(("a", "one"), ("a", "one")), [0, 1], {}),
        "test": (rows(("a", "one"), ("a", "two"), ("a", "two")), [0], {1: 130, 2: 120}),
    }
    lost = Lost.of(Limit(96, 256), parts)
    assert lost.examples == [Left("test", "a", "two", 130), Left("test", "a", "two", 120)]
    assert (lost.sources, lost.tasks) == (["two"], {"train": [], "test": []})
    assert list(lost.said("my.jsonl")) == [
        "my.jsonl: nothing is left of source 'two': 2 of 2 rows are too long for --max-length 96 (without its context "
        "the shortest of them takes 120 tokens): choose --max-length 120 or more, or shorten them"
    ]
    assert lost.lengths("two") == [130, 120] and lost.lengths("two", part="train") == []


def test_a_task_is_told_for_the_part_that_has_lost_it_and_no_source_that_is_left() -> None:
    parts = {
        "train": (rows(("a", "x"), ("b", "x")), [0, 1], {}),
        "validation": (rows(("b", "x"), ("b", ""), ("a", "")), [2], {0: 300, 1: 310}),
    }
    lost = Lost.of(Limit(96, 256), parts)
    assert lost.tasks == {"train": [], "validation": ["b"]} and lost.sources == []
    (line,) = lost.said("")
    assert line.startswith("validation: nothing is left of task 'b': 2 of 2 rows are too long for --max-length 96")
    assert line.endswith("shorten them, for this base has 256 positions")


def test_of_many_only_the_first_are_named_and_where_all_fits_nothing_is_said() -> None:
    part = rows(*(("", f"source {number}") for number in range(5)), ("", "short"))
    lost = Lost.of(Limit(8), {"train": (part, [5], dict.fromkeys(range(5), 9))})
    said = list(lost.said("d"))
    assert len(said) == 4 and said[-1] == "d: nothing is left of 2 more sources" and "'source 2'" in said[2]
    assert list(Lost.of(Limit(8), {"train": (part, list(range(6)), {})}).said("d")) == []
