"""Texts in parts, and their tokens: which of them stand for what a user wrote. Knows tokenizers; knows no templates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from smartmops.checks.errors import WrongType

THOUGHT = "</think>"  # which ends what models think before they answer
SWITCH = re.compile(r"/(no_?)?think\b")  # words by which a user or a system turns thinking off and on


@dataclass(frozen=True)
class Part:
    """Text that is tokenised on its own."""

    text: str
    own: tuple[tuple[int, int], ...] = ()  # where in it stands what user or application wrote: first character, end
    closed: bool = False  # whether the token that ends a turn follows


@dataclass(frozen=True)
class Prompt:
    """Tokens up to the answer."""

    input_ids: list[int]
    gate_mask: list[int] | None  # 1 on tokens of the user's and the application's own text; None: the tokenizer is slow
    header: int  # tokens at the end that open the assistant's turn


def a_tokenizer(given: Any) -> Any:
    """What was given for a tokenizer, where it is one.

    Raises:
        WrongType: it is none.
    """
    if not hasattr(given, "chat_template"):
        raise WrongType(f"tokenizer={str(given)[:40]!r}: give the model's tokenizer")
    return given


def tokens(tokenizer: PreTrainedTokenizerBase, parts: Sequence[Part]) -> list[tuple[list[int], list[int]]]:
    """Token ids of each part, without special tokens around it, and 1 on those that lie within what the user wrote."""
    texts = [part.text for part in parts]
    if not parts or not tokenizer.is_fast:
        return [(ids, [0] * len(ids)) for ids in ids_of(tokenizer, texts)]
    made = tokenizer(texts, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    return [
        (ids, [int(any(_within(part.text, start, end, *own) for own in part.own)) for start, end in offsets])
        for part, ids, offsets in zip(parts, made["input_ids"], made["offset_mapping"], strict=True)
    ]


def _within(text: str, start: int, end: int, first: int, last: int) -> bool:
    """Whether a token from `start` to `end` lies within `first` to `last`; blanks around a word may stand outside."""
    if start >= last or end <= first or start >= end:
        return False
    return not text[start : max(start, first)].strip() and not text[min(end, last) : end].strip()


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens around it."""
    found = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return [list(ids) for ids in found]


def whole_after(tokenizer: PreTrainedTokenizerBase, text: str, at: int) -> list[int]:
    """Whole tokens of a text from character `at` on, and from the blanks before it where these are part of one."""
    if not tokenizer.is_fast:
        return ids_of(tokenizer, [text[at:]])[0]
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(made["input_ids"], made["offset_mapping"], strict=True)
    return [token for token, (start, end) in pairs if start >= at or (end > at and not text[start:at].strip())]


def shared(one: Sequence[Any], two: Sequence[Any]) -> int:
    """Length of the common beginning."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False))))


def span(text: str, at: int, content: str, behind: str, answers: bool) -> int | None:
    """Characters that a message takes from `at` on, up to what is written behind it; None: it does not stand there.

    Templates trim blanks around some messages, take words that switch thinking off or on for themselves, and those that
    think leave out the thoughts of earlier answers.
    """
    for words in (content, *(() if SWITCH.search(content) is None else (SWITCH.sub("", content),))):
        for blanks in (None, "\n"):
            for each in (words, words.strip(blanks), words.lstrip(blanks), words.rstrip(blanks)):
                if text.startswith(each + behind, at):
                    return len(each)
    end = text.find(behind, at) if answers and THOUGHT in content else -1
    return None if end < 0 else end - at


def holds(text: str, answer: str) -> bool:
    """Whether a text has all of an answer; blanks around it do not count, nor those around thoughts in it."""
    if THOUGHT not in answer:
        return answer.strip() in text
    return "".join(answer.split()) in "".join(text.split())
