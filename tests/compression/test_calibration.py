"""Calibration rows are full, drawn by seed, and share no text with what is held out."""

from __future__ import annotations

import json
import lzma
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from smartmops.compression.calibration import HELD_OUT, SHORTEST, Text, calibration_rows, held_out_batches, load, plain
from smartmops.data.tasks import splits

MARK = re.compile(r"<\d\d\d>")


def marks(text: str) -> set[str]:
    return set(MARK.findall(text))


def decoded(rows: torch.Tensor, tokenizer: Any) -> str:
    return "".join(tokenizer.batch_decode(rows))


@pytest.fixture
def marked_data(tmp_path: Path) -> Path:
    """60 examples, each with a mark of its own in instruction, context and response."""
    file = tmp_path / "marked.jsonl"
    rows = [
        dict(instruction=f"Name <{i:03}>.", context=f"It is <{i:03}>.", response=f"<{i:03}>", category="ab"[i % 2])
        for i in range(60)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def marked_text(tmp_path: Path) -> Path:
    file = tmp_path / "marked.txt"
    file.write_text(" ".join(f"word <{i:03}>" for i in range(600)))
    return file


@pytest.mark.parametrize(("sequences", "length"), [(1, 32), (7, 50), (20, 64)])
def test_rows_have_the_number_and_length_asked_for(sequences: int, length: int, marked_text: Path, tokenizer) -> None:
    rows = calibration_rows(plain(marked_text), tokenizer, sequences, length, seed=0)
    assert rows.shape == (sequences, length)
    assert (rows != tokenizer.pad_token_id).all()


def test_rows_are_the_pieces_end_to_end_with_eos_between(tokenizer) -> None:
    text = Text([f"This is piece {i}." for i in range(30)], [], "some.txt")
    tokens = calibration_rows(text, tokenizer, 10, 32, seed=3).flatten().tolist()
    order = list(text.pieces)
    random.Random("3 calibration").shuffle(order)
    want = [token for piece in order for token in [*tokenizer(piece)["input_ids"], tokenizer.eos_token_id]]
    assert tokens == want[:320]


def test_the_seed_draws_the_rows(marked_data: Path, tokenizer) -> None:
    text = load(str(marked_data))
    one, same, other = (calibration_rows(text, tokenizer, 8, 40, seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_without_a_length_rows_take_as_much_as_the_text_has(marked_text: Path, tokenizer) -> None:
    text = plain(marked_text)
    whole = sum(len(tokenizer(piece)["input_ids"]) + 1 for piece in text.pieces)
    for sequences in (3, 10):
        assert calibration_rows(text, tokenizer, sequences, None, 0).shape == (sequences, min(2048, whole // sequences))
    assert calibration_rows(text, tokenizer, 10, None, 0, most=100).shape == (10, 100)


def test_without_a_length_rows_are_never_shorter_than_they_may_be(tokenizer) -> None:
    text = Text(["This is the answer of the question. " * 20], [], "short.txt")
    tokens = len(tokenizer(text.pieces[0])["input_ids"]) + 1
    most = tokens // SHORTEST
    assert calibration_rows(text, tokenizer, most, None, 0).shape[1] >= SHORTEST
    message = f"calibration='short.txt' has {tokens} tokens, but {most + 1} sequences of {SHORTEST} need {SHORTEST * (most + 1)}"
    with pytest.raises(ValueError, match=f"{message}: give more text, or choose --sequences up to {most}"):
        calibration_rows(text, tokenizer, most + 1, None, 0)


def test_too_little_text_for_one_row_names_no_way_but_more_text(tokenizer) -> None:
    text = Text(["Name it."], [], "short.txt")
    tokens = len(tokenizer("Name it.")["input_ids"]) + 1
    with pytest.raises(ValueError, match=f"has {tokens} tokens, but 4 sequences of 100 need 400: give more text$"):
        calibration_rows(text, tokenizer, 4, 100, 0)


@pytest.mark.parametrize("sequences", [0, -1])
def test_a_number_of_sequences_that_is_none_is_refused(sequences: int, tokenizer) -> None:
    with pytest.raises(ValueError, match=f"sequences={sequences}: choose 1 or more"):
        calibration_rows(Text(["Name it."] * 99, [], "some.txt"), tokenizer, sequences, None, 0)


@pytest.mark.parametrize("length", [1, 0, -5])
def test_a_length_that_measures_nothing_is_refused(length: int, tokenizer) -> None:
    text = Text(["Name it."] * 99, ["This is the answer."], "some.txt")
    with pytest.raises(ValueError, match=f"sequence_length={length}: choose 2 tokens or more"):
        held_out_batches(text, tokenizer, length)
    with pytest.raises(ValueError, match=f"sequence_length={length}: choose 2 tokens or more"):
        calibration_rows(text, tokenizer, 4, length, 0)


@pytest.mark.parametrize("options", [{}, dict(limit=30), dict(test_share=0.3), dict(seed=5)], ids=str)
def test_no_held_out_example_is_calibrated_on(options: dict[str, Any], marked_data: Path, tokenizer) -> None:
    text = load(str(marked_data), **options)
    held_out = held_out_batches(text, tokenizer, 256)
    tokens = sum(len(tokenizer(piece)["input_ids"]) + 1 for piece in text.pieces)
    rows = calibration_rows(text, tokenizer, 1, tokens, seed=0, most=tokens)  # all there is
    seen, kept = marks(decoded(rows, tokenizer)), marks("".join(decoded(b["input_ids"], tokenizer) for b in held_out))
    assert seen.isdisjoint(kept)
    named = {"limit": None, "test_share": 0.1, "seed": 0} | options
    train, test = splits(str(marked_data), *named.values())  # as `train` has it
    assert kept == {example.response for example in test}
    assert seen == {example.response for example in train}


def test_the_last_tenth_of_a_text_is_not_calibrated_on(marked_text: Path, tokenizer) -> None:
    text = plain(marked_text)
    tokens = sum(len(tokenizer(piece)["input_ids"]) + 1 for piece in text.pieces)
    seen = marks(decoded(calibration_rows(text, tokenizer, 1, tokens, 0, most=tokens), tokenizer))
    kept = marks("".join(decoded(batch["input_ids"], tokenizer) for batch in held_out_batches(text, tokenizer, 64)))
    assert seen.isdisjoint(kept)
    assert max(seen) < min(kept)
    assert len(seen) == pytest.approx(600 * (1 - HELD_OUT), abs=1)
    assert len(kept) >= 50  # the rest does not fill a row


def test_only_responses_of_held_out_examples_count(marked_data: Path, tokenizer) -> None:
    text, want = load(str(marked_data)), []
    for batch in held_out_batches(text, tokenizer, 256, batch_size=4):
        assert batch["input_ids"].shape[0] <= 4
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            counted = labels != -100
            assert torch.equal(ids[counted], labels[counted])
            want.append(tokenizer.decode(labels[counted]))
    assert sorted(want) == sorted(example.response + tokenizer.eos_token for example in text.held_out)


def test_every_token_of_held_out_text_counts(marked_text: Path, tokenizer) -> None:
    batches = held_out_batches(plain(marked_text), tokenizer, 32, batch_size=8, most=10)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(8, 32), (2, 32)]
    for batch in batches:
        assert torch.equal(batch["labels"], batch["input_ids"])


def test_held_out_text_shorter_than_a_row_is_one_short_row(tokenizer) -> None:
    (batch,) = held_out_batches(Text([], ["Name it."], "short.txt"), tokenizer, 64)
    assert tokenizer.decode(batch["input_ids"][0]) == "<bos>Name it.<eos>"


def test_held_out_batches_are_padded_on_the_right(marked_data: Path, tokenizer) -> None:
    for batch in held_out_batches(load(str(marked_data)), tokenizer, 256):
        mask = batch["attention_mask"]
        assert (mask[:, :-1] >= mask[:, 1:]).all()
        assert (batch["labels"][mask == 0] == -100).all()


def test_nothing_held_out_is_an_error(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"'short.txt' holds out no text to measure on: give more"):
        held_out_batches(Text(["a"], [], "short.txt"), tokenizer, 64)


@pytest.mark.parametrize("ending", [".txt", ".raw", ".md", ".xz", ".txt.xz"])
def test_text_is_read_whatever_its_ending(ending: str, tmp_path: Path) -> None:
    file, words = tmp_path / f"text{ending}", "Äpfel und Birnen. " * 50
    file.write_bytes(lzma.compress(words.encode()) if ending.endswith(".xz") else words.encode())
    text = load(str(file))
    assert " ".join(text.pieces + text.held_out).split() == words.split()  # 900 characters: the cut is between words
    assert text.name == str(file)


def test_documents_end_at_their_mark(tmp_path: Path) -> None:
    file = tmp_path / "documents.txt"
    documents = [f"Document {i}, {'and so on ' * i}end." for i in range(20)]
    file.write_text("\n<|endoftext|>\n".join(documents))
    text = plain(file)
    assert "endoftext" not in "".join(text.pieces + text.held_out)
    whole = len(text.pieces) - 1  # the last is cut
    assert text.pieces[:whole] == documents[:whole]
    assert text.held_out[-1] == documents[-1]
    assert whole >= 17


def test_long_documents_are_cut_into_pieces(tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("word " * 20_000)
    pieces = plain(file).pieces
    assert len(pieces) == 5
    assert " ".join(pieces).split() == ["word"] * 18_000


@pytest.mark.parametrize("content", [b"", b"  \n\n ", lzma.compress(b"")])
def test_an_empty_file_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / ("empty.xz" if content.startswith(b"\xfd") else "empty.txt")
    file.write_bytes(content)
    with pytest.raises(
        ValueError, match=re.escape(f"calibration={str(file)!r} is empty: give a text file with text in it")
    ):
        load(str(file))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"calibration='.*nowhere.txt' cannot be read .*: give UTF-8 text, plain or .xz"
    ):
        load(str(tmp_path / "nowhere.txt"))


@pytest.mark.parametrize(("name", "content"), [
    ("latin.txt", "Äpfel".encode("latin-1")),
    ("plain.xz", b"no archive"),
    ("half.xz", lzma.compress(b"some text " * 100)[:60]),
    ("latin.xz", lzma.compress("Äpfel".encode("latin-1"))),
])  # fmt: skip
def test_what_is_no_utf_8_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"calibration='.*{name}' cannot be read .*: give UTF-8 text, plain or .xz"):
        load(str(tmp_path / name))


def test_a_folder_is_no_text_file(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        load(str(tmp_path / "folder.txt"))


def test_only_the_embedded_base_needs_no_text(tokenizer) -> None:
    with pytest.raises(
        ValueError, match="no calibration text for llama-7b: give --calibration a text file, or the DATA"
    ):
        load("", base="llama-7b")
    text = load("", base="tiny")
    assert text.name == "office"
    assert text.pieces and text.held_out


def test_columns_of_other_names_are_read_as_in_training(marked_data: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in marked_data.read_text().splitlines()]
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_text("".join(json.dumps({"reply_text": row.pop("response"), **row}) + "\n" for row in rows))
    with pytest.raises(ValueError, match="reply_text"):
        load(str(renamed))
    assert load(str(renamed), columns=("response=reply_text",)).pieces == load(str(marked_data)).pieces
