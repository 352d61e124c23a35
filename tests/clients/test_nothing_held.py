"""A client with nothing to train on: which one, why, and a way out that is one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from federation import write
from smartmops.clients.holdings import Holdings, holdings_of
from smartmops.options.federation import FederateConfig
from smartmops.reading.task import Task
from smartmops.rows.example import Example
from smartmops.tokens.batches import encode

Make = Callable[..., FederateConfig]
Held = Callable[..., Holdings]
SHORT = {"instruction": "Apple.", "response": "A", "category": "a"}
LONG = {"instruction": "apple " * 30, "response": "A", "category": "a"}
LONGER = {"instruction": "apple " * 300, "response": "A", "category": "a"}


@pytest.fixture
def held(config: Make, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Held:
    """Who holds what of the clients' files, or of `train`, on a base without weights, of 256 positions."""

    def found(
        files: dict[str, list[dict[str, str]]] | None = None,
        train: list[Example] | None = None,
        test: list[Example] | None = None,
        **changes: Any,
    ) -> Holdings:
        if files is not None:
            (tmp_path / "clients").mkdir()
            for name, own in files.items():
                write(tmp_path / "clients" / f"{name}.jsonl", own)
            changes["clients_data"] = tmp_path / "clients"
        settings = config(**changes)
        base = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=256))
        given = [Example("Pear.", "", "P", "b")] if train is None else train
        return holdings_of(settings, Task.of(base, tokenizer, given, test or [], settings))

    return found


def tokens(row: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> int:
    return len(encode(Example(row["instruction"], "", row["response"]), tokenizer, 10_000).input_ids)


def test_rows_too_long_are_the_cause_and_a_larger_length_the_way_out(
    held: Held, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    least = tokens(LONG, tokenizer)
    assert 96 < least <= 256 < tokens(LONGER, tokenizer)
    said = (f"1 of 2 clients have nothing to train on, such as 'paris': 2 of 2 rows are too long for --max-length 96 "
            f"(without its context the shortest of them takes {least} tokens): choose --max-length {least} or more, or "
            "shorten them, or leave them out with --skip-empty")  # fmt: skip
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        held({"berlin": [SHORT], "paris": [LONGER, LONG]})


def test_the_way_out_is_one(held: Held, tokenizer: PreTrainedTokenizerFast) -> None:
    found = held({"berlin": [SHORT], "paris": [LONGER, LONG]}, max_length=tokens(LONG, tokenizer))
    assert (found.names, found.rows) == (["berlin", "paris"], [[0], [1]])


def test_clients_without_rows_that_fit_can_be_left_out(held: Held) -> None:
    found = held({"berlin": [SHORT, LONG], "paris": [LONG]}, skip_empty=True)
    assert (found.names, found.rows, found.table) == (["berlin"], [[0]], {"a": [1]})


@pytest.mark.parametrize(("max_length", "what"), [(96, "--max-length 96"), (512, "the 256 positions of this base")])
def test_rows_longer_than_the_base_has_positions_must_become_shorter(held: Held, max_length: int, what: str) -> None:
    said = f"'paris': 1 of 1 rows are too long for {what} .*: shorten them, for this base has 256 positions, or leave"
    with pytest.raises(ValueError, match=said):
        held({"berlin": [SHORT], "paris": [LONGER]}, max_length=max_length)


def test_a_category_held_out_is_the_cause(held: Held) -> None:
    other = SHORT | {"category": "b"}
    said = (r"'paris': 1 of 2 rows are too long for --max-length 96 .* and 1 of 2 rows are of the category that --hold-out b "
            r"leaves out: choose --max-length \d+ or more, or shorten them; leave --hold-out away, or leave them out with")  # fmt: skip
    with pytest.raises(ValueError, match=said):
        held({"berlin": [SHORT], "paris": [other, LONG]}, hold_out="b")


@pytest.mark.parametrize("skip_empty", [True, False])
def test_where_no_client_has_anything_leaving_them_out_is_no_way_out(held: Held, skip_empty: bool) -> None:
    other = SHORT | {"category": "b"}
    with pytest.raises(ValueError, match=r"^2 of 2 clients have nothing to train on.*: leave --hold-out away$"):
        held({"berlin": [other], "paris": [other]}, hold_out="b", skip_empty=skip_empty)
    with pytest.raises(ValueError, match=r"^train: 2 of 2 rows are too long for --max-length 96 .*, or shorten them$"):
        held(None, train=[example(LONG)] * 2, skip_empty=skip_empty)


def example(row: dict[str, str], source: str = "") -> Example:
    return Example(row["instruction"], "", row["response"], row["category"], source)


def test_a_source_that_lost_all_its_rows_is_named_with_the_cause(
    held: Held, capsys: pytest.CaptureFixture[str]
) -> None:
    berlin, rome = example(SHORT, "berlin"), example(SHORT, "rome")
    with pytest.raises(ValueError, match=r"^1 of 2 clients .* 'paris': 1 of 1 rows are too long for --max-length 96"):
        held(train=[berlin, example(LONG, "paris")], partition="source")
    with pytest.raises(ValueError, match=r"^1 of 2 clients .* 'rome': 1 of 1 rows are in the test split: give it more"):
        held(train=[berlin], test=[rome], partition="source")
    with pytest.raises(ValueError, match=r"^1 of 2 clients .* 'rome': 2 of 2 rows are too long for --max-length 96"):
        held(train=[berlin], test=[berlin, *[example(LONG, "rome")] * 2], partition="source")
    found = held(train=[berlin, example(LONG, "paris")], test=[berlin, rome], partition="source", skip_empty=True)
    assert (found.names, found.rows, found.table) == (["berlin"], [[0]], {"a": [1]})
    told = " ".join(capsys.readouterr().out.split())
    assert "nothing is left of source 'paris': 1 of 1 rows are too long" in told, "whoever skips it is told of it too"


def test_rows_that_are_too_long_are_counted_where_too_few_are_shared_out(held: Held) -> None:
    rows = [example(SHORT)] * 5 + [example(LONG)] * 4
    with pytest.raises(
        ValueError, match=r"'client \d': 5 rows .* among 5 \(4 of 9 rows are too long for --max-length 96"
    ):
        held(train=rows, clients=5, skew=30.0)
    with pytest.raises(
        ValueError, match=r"clients=6, but there are 5 examples.* \(4 of 9 rows are too long for --max-l"
    ):
        held(train=rows, clients=6)


def test_an_empty_response_is_said_with_the_clients_file_and_line(held: Held) -> None:
    with pytest.raises(ValueError, match=r"paris\.jsonl.*line 1.*(empty|response)"):
        held({"berlin": [SHORT], "paris": [SHORT | {"response": ""}]})


def test_a_file_without_lines_is_named(held: Held) -> None:
    with pytest.raises(ValueError, match=r"paris\.jsonl holds no examples"):
        held({"berlin": [SHORT], "paris": []})


def test_a_server_with_nothing_to_test_on_is_told_why(config: Make, tmp_path: Path) -> None:
    lone = write(tmp_path / "lone.jsonl", [SHORT, SHORT | {"category": "b"}])
    with pytest.raises(ValueError, match=r"2 training and 0 test examples.* give two or more"):
        Task.load(config(data=str(lone)).central(), base=SimpleNamespace())
