"""Examples in, padded batches of token ids out. Knows templates and labels; knows no models."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from smartmops.tuner.packed import IGNORED

from .example import Example
from .stored import BATCH, store


def prompt_text(example: Example) -> str:
    """Everything before the response, as the model reads it."""
    context = f"\n\n### Context:\n{example.context}" if example.context else ""
    return f"### Instruction:\n{example.instruction}{context}\n\n### Response:\n"


class TooLong(ValueError):
    """Instruction and response alone exceed the maximal length."""


@dataclass(frozen=True)
class Encoded:
    """One row of tokens, not yet padded."""

    input_ids: list[int]
    labels: list[int]  # IGNORED but on the response and its EOS
    category: str = ""
    tokens_cut: int = 0  # tokens of context, or of solved examples, left out to fit
    shots: int = 0  # solved examples that stand before the prompt
    gate_embedding: Float[Tensor, " width"] | None = None  # what an external embedder makes of the instruction


ROWS = pa.schema({
    "input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32()), "category": pa.large_string(),
    "tokens_cut": pa.int32(), "shots": pa.int32(), "gate_embedding": pa.list_(pa.float32()),
})  # fmt: skip


@dataclass(frozen=True)
class Truncation:
    """What a maximal length cost. Callers print it."""

    shortened: int = 0  # examples that lost the end of their context
    dropped: int = 0  # examples whose instruction and response alone do not fit
    tokens_cut: int = 0  # tokens of context lost by the shortened ones

    def __str__(self) -> str:
        """One line for the user."""
        return (
            f"{self.shortened} examples lost the end of their context ({self.tokens_cut} tokens), "
            f"{self.dropped} dropped (instruction and response alone do not fit)"
        )


@dataclass(frozen=True)
class Encoding:
    """Rows and the report on what did not fit."""

    rows: Sequence[Encoded]
    truncation: Truncation
    kept: list[int]  # index of each row's example


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Prompt with the tokenizer's special tokens, response without, then EOS; loss on response and EOS only.

    A row longer than `max_length` tokens loses the end of its context, never of its response or instruction.

    Raises:
        TooLong: Instruction and response alone do not fit.
        ValueError: Empty response, or a tokenizer without EOS.
    """
    return _row(example, *_tokens([example], tokenizer)[0], tokenizer, max_length)


def encode_all(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    embed: Callable[[Sequence[str]], Sequence[Sequence[float]]] | None = None,
    folder: Path | None = None,
) -> Encoding:
    """`encode` of every example that fits `max_length` tokens, and a count of what was cut and dropped.

    Args:
        examples: Read once, a thousand at a time.
        embed: Makes each row's `gate_embedding` of its instruction.
        folder: Where the rows are written and memory-mapped from; None: a list of them.

    Raises:
        ValueError: As `encode`; also if no example fits, or the folder cannot hold the rows.
    """
    cut: list[int] = []
    kept: list[int] = []
    dropped: list[TooLong] = []

    def rows() -> Iterator[Encoded]:
        for start in range(0, len(examples), BATCH):
            some = examples[start : start + BATCH]
            vectors = torch.tensor(embed([each.instruction for each in some])) if embed else [None] * len(some)
            for number, (each, tokens) in enumerate(zip(some, _tokens(some, tokenizer, start), strict=True)):
                try:
                    row = _row(each, *tokens, tokenizer, max_length)
                except TooLong as error:
                    dropped[:] = [error]
                    continue
                kept.append(start + number)
                if row.tokens_cut:
                    cut.append(row.tokens_cut)
                yield replace(row, gate_embedding=vectors[number])

    found = list(rows()) if folder is None else store(rows(), ROWS, _parts, _restored, folder)
    if not found:
        problem = f"none of {len(examples)} examples fits: {dropped[0]}" if examples else "no examples to encode"
        raise ValueError(problem)
    return Encoding(found, Truncation(len(cut), len(examples) - len(found), sum(cut)), kept)


def few_shot(
    example: Example, shots: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    """Solved examples before the prompt of `example`; loss on its response and EOS only.

    Each shot is prompt, response, EOS, and special tokens stand once, at the start: the episodes of pretraining. Where
    `max_length` is short the first shots are left out; `shots` and `tokens_cut` of the row say so.

    Raises:
        TooLong: Not even `example` alone fits.
        ValueError: As `encode`.
    """
    row = encode(example, tokenizer, max_length)
    lead = _lead(tokenizer)
    blocks = [prompt[lead:] + response for prompt, response in _tokens(shots, tokenizer)]
    cut = 0
    while blocks and sum(map(len, blocks)) + len(row.input_ids) > max_length:
        cut += len(blocks.pop(0))
    solved = [token for block in blocks for token in block]
    return replace(
        row,
        input_ids=row.input_ids[:lead] + solved + row.input_ids[lead:],
        labels=[IGNORED] * len(solved) + row.labels,
        tokens_cut=row.tokens_cut + cut,
        shots=len(blocks),
    )


def prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> dict[str, Int[Tensor, "batch length"]]:
    """A batch to generate from: `input_ids` and `attention_mask`, padded on the left.

    A prompt longer than `max_length` tokens loses the end of its context.

    Raises:
        TooLong: An instruction alone does not fit.
        ValueError: No examples, or a tokenizer that has neither a padding nor an EOS token.
    """
    if not examples:
        raise ValueError("no examples to make prompts of: give one at least")
    rows = _prompt_tokens(examples, tokenizer)
    if max_length is not None:
        rows = [
            ids if len(ids) <= max_length else _shorten(example, tokenizer, max_length, 0)
            for ids, example in zip(rows, examples, strict=True)
        ]
    ones = [[1] * len(row) for row in rows]
    return {"input_ids": _pad(rows, _pad_id(tokenizer), "left"), "attention_mask": _pad(ones, 0, "left")}


def pack(rows: Sequence[Encoded]) -> dict[str, Int[Tensor, " _"] | Float[Tensor, "segments width"]]:
    """Rows laid end to end, without padding: `input_ids` and `labels` [tokens], `lengths` [segments].

    `pooled` [segments, width] where the rows carry a gate embedding.

    Raises:
        ValueError: Only some of the rows carry one.
    """
    batch = {
        "input_ids": torch.tensor([token for row in rows for token in row.input_ids]),
        "labels": torch.tensor([label for row in rows for label in row.labels]),
        "lengths": torch.tensor([len(row.input_ids) for row in rows]),
    }
    embeddings = _embeddings(rows)
    return batch if embeddings is None else batch | {"pooled": embeddings}


def packed(rows: Sequence[Encoded]) -> dict[str, dict[str, Tensor]]:
    """`pack` as a collator for a model that takes `packed`."""
    return {"packed": pack(rows)}


def by_budget(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in groups of at most `budget` tokens, the shortest first; a longer row is a group of its own."""
    groups: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not groups or lengths[index] > room:
            groups.append([])
            room = budget
        groups[-1].append(index)
        room -= lengths[index]
    return groups


@dataclass
class Collator:
    """Rows to a batch for `Trainer` or a `DataLoader`.

    Raises:
        ValueError: A tokenizer that has neither a padding nor an EOS token; a padding side that is neither left nor
            right; rows of which only some carry a gate embedding.
    """

    tokenizer: PreTrainedTokenizerBase
    padding_side: str = "right"  # or "left"
    pad_to_multiple_of: int | None = None  # tokens

    def __post_init__(self) -> None:
        self.pad_id = _pad_id(self.tokenizer)
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"padding_side={self.padding_side!r}: choose 'left' or 'right'")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of={self.pad_to_multiple_of}: choose 1 or more tokens, or None")

    def __call__(
        self, rows: Sequence[Encoded]
    ) -> dict[str, Int[Tensor, "batch length"] | Float[Tensor, "batch width"]]:
        """`input_ids`, `attention_mask` and `labels`; `gate_embedding` where the rows carry one."""
        ids, side, multiple = [row.input_ids for row in rows], self.padding_side, self.pad_to_multiple_of or 1
        batch = {
            "input_ids": _pad(ids, self.pad_id, side, multiple),
            "attention_mask": _pad([[1] * len(row) for row in ids], 0, side, multiple),
            "labels": _pad([row.labels for row in rows], IGNORED, side, multiple),
        }
        embeddings = _embeddings(rows)
        return batch if embeddings is None else batch | {"gate_embedding": embeddings}


def _embeddings(rows: Sequence[Encoded]) -> Float[Tensor, "rows width"] | None:
    found = [row.gate_embedding for row in rows if row.gate_embedding is not None]
    if 0 < len(found) < len(rows):
        raise ValueError(f"{len(found)} of {len(rows)} rows carry a gate_embedding: give one to all or to none")
    return torch.stack(found) if found else None


def _row(
    example: Example, prompt: list[int], response: list[int], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    whole = len(prompt)
    if whole + len(response) > max_length:
        prompt = _shorten(example, tokenizer, max_length, len(response))
    labels = [IGNORED] * len(prompt) + response
    return Encoded(prompt + response, labels, example.category, tokens_cut=whole - len(prompt))


def _shorten(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int, reserved: int) -> list[int]:
    """Prompt tokens with as much of the context's beginning as `max_length - reserved` tokens hold."""

    def tokens(characters: int) -> list[int]:
        return _prompt_tokens([replace(example, context=example.context[:characters])], tokenizer)[0]

    # Cutting characters and tokenising again, not cutting tokens: a row is always some example's own tokenisation.
    lengths = range(len(example.context) + 1)
    characters = bisect_right(lengths, max_length - reserved, key=lambda n: len(tokens(n))) - 1
    if characters < 0:
        what = "instruction and response" if reserved else "instruction"
        raise TooLong(
            f"{what} take {len(tokens(0)) + reserved} tokens without any context, but max_length={max_length}: raise "
            f"max_length or shorten the example ({example.instruction[:60]!r})"
        )
    return tokens(characters)


def _parts(row: Encoded) -> tuple[Any, ...]:
    vector = None if row.gate_embedding is None else row.gate_embedding.numpy()
    return row.input_ids, row.labels, row.category, row.tokens_cut, row.shots, vector


def _restored(ids: list[int], labels: list[int], category: str, cut: int, shots: int, vector: Any) -> Encoded:
    return Encoded(ids, labels, category, cut, shots, None if vector is None else torch.tensor(vector))


def _tokens(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, first: int = 0
) -> list[tuple[list[int], list[int]]]:
    """Prompt and response of each example, the first one being number `first`; the response ends with EOS."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no EOS token, so no response would ever end: set tokenizer.eos_token"
        )
    for index, example in enumerate(examples, first):
        if not example.response.strip():
            raise ValueError(
                f"example {index} ({example.instruction[:60]!r}) has an empty response, so nothing to learn: "
                "write one or leave the example out"
            )
    if not examples:
        return []
    responses = tokenizer([example.response for example in examples], add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    ended = [[*ids, tokenizer.eos_token_id] for ids in responses]
    return list(zip(_prompt_tokens(examples, tokenizer), ended, strict=True))


def _prompt_tokens(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Prompts with the special tokens that the tokenizer puts before a text, without those it puts behind."""
    texts = [prompt_text(example) for example in examples]
    rows: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"]
    return [row[:-1] if row[-1] == tokenizer.eos_token_id else row for row in rows]


def _lead(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many special tokens start a text."""
    example = Example("", "", "")
    bare = tokenizer(prompt_text(example), add_special_tokens=False)["input_ids"]
    return len(_prompt_tokens([example], tokenizer)[0]) - len(bare)


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """EOS fills in for a missing padding token: mask and labels say what is padding, so its id never matters."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad is None:
        raise ValueError(f"{type(tokenizer).__name__} has neither a padding nor an EOS token: set tokenizer.pad_token")
    return int(pad)


def _pad(rows: Sequence[list[int]], fill: int, side: str, multiple: int = 1) -> Int[Tensor, "batch length"]:
    length = -(-max(map(len, rows)) // multiple) * multiple
    gaps = [[fill] * (length - len(row)) for row in rows]
    pairs = zip(rows, gaps, strict=True)
    return torch.tensor([gap + row if side == "left" else row + gap for row, gap in pairs], dtype=torch.int64)
