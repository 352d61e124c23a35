"""Texts that spell control tokens are counted and named before anything is learnt of them."""

from __future__ import annotations

from typing import Any

from smartmops.rows.example import Example
from smartmops.tokens.batches import encode
from smartmops.tokens.controls import controls_said


def test_texts_that_end_a_turn_in_their_middle_are_counted(tokenizer: Any) -> None:
    ends, asks = Example("Go.", "", "one <eos> two <eos>"), Example("<bos>Go.", "", "one", history=(("a", "<eos>"),))
    assert encode(ends, tokenizer, 96).labels.count(tokenizer.eos_token_id) == 3, "the text's own two, and the end"
    (line,) = controls_said("train", [ends, asks, Example("Go.", "eos <e os>", "one")], tokenizer)
    assert line.startswith("train: 2 examples spell control tokens of this model (<eos>, <bos>), at which a turn may")
    assert list(controls_said("train", [Example("Go.", "", "one")], tokenizer)) == []
