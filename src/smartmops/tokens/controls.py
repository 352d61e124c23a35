"""Texts that a tokenizer reads as control tokens, as the end of a turn. Knows tokenizers and examples; mends none."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from smartmops.rows.example import Example
from smartmops.rows.faults import some


def controls_said(name: str, examples: Iterable[Example], tokenizer: Any) -> Iterator[str]:
    """A line where texts of examples hold what the tokenizer makes control tokens of; nothing where none does.

    Such an answer ends in its middle, or a question speaks in the assistant's turn: the template writes these tokens,
    and text that spells one cannot be told from it.
    """
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    names = {*map(str, tokenizer.all_special_tokens), *added} - {""}
    if not names:
        return
    spelt, found, count = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True)))), Counter[str](), 0
    for example in examples:
        turns = [text for turn in example.history for text in turn]
        texts = [example.system, *turns, example.instruction, example.context, example.response]
        here = {token for text in texts for token in spelt.findall(text)}
        count += bool(here)
        found.update(here)
    if count:
        tokens = some([token for token, _ in found.most_common()], 3)
        yield (f"{name}: {count} examples spell control tokens of this model ({tokens}), at which a turn may begin or "
               "end in the middle of a text: write them otherwise, or leave these examples out")  # fmt: skip
