"""Examples in, padded batches of token ids out. Knows labels and lengths; knows no models."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from smartmops.attention.packed import IGNORED
from smartmops.checks.errors import BaseModelError, ConfigError, DataError
from smartmops.rows.example import Example
from smartmops.rows.stored import BATCH, store

from .parts import Prompt
from .template import Template, Turns


class TooLong(DataError):
    """Instruction and response alone exceed the maximal length.

    Attributes:
        tokens: Of an example without its context.
    """

    def __init__(self, message: str, tokens: int = 0) -> None:
        super().__init__(message)
        self.tokens = tokens


class NoneFits(DataError):
    """Every example is too long.

    Attributes:
        lengths: Tokens of each without its context.
    """

    def __init__(self, message: str, lengths: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.lengths = lengths


@dataclass(frozen=True)
class Encoded:
    """One row of tokens, not yet padded."""

    input_ids: list[int]
    labels: list[int]  # IGNORED but on the response and the token that ends it
    category: str = ""
    tokens_cut: int = 0  # tokens of context, or of solved examples, left out to fit
    shots: int = 0  # solved examples that stand before the prompt
    gate_embedding: Float[Tensor, " width"] | None = None  # what an external embedder makes of the instruction
    gate_mask: list[int] | None = None  # 1 on tokens of the user's own text; None: on every token without a label
    header: int = 0  # tokens right before the response that open the assistant's turn


ROWS = pa.schema({
    "input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32()), "category": pa.large_string(),
    "tokens_cut": pa.int32(), "shots": pa.int32(), "gate_embedding": pa.list_(pa.float32()),
    "gate_mask": pa.list_(pa.int8()), "header": pa.int32(),
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
    too_long: dict[int, int] = field(default_factory=dict)  # tokens without context of each dropped example, by index


def encode(
    example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int, template: Template | None = None
) -> Encoded:
    """Prompt and response as the template writes them; loss on the response and the token that ends it only.

    A row longer than `max_length` tokens loses the end of its context, never of its response or instruction.

    Args:
        example: With its earlier turns, which are not learnt.
        tokenizer: The model's.
        max_length: Tokens.
        template: Of this tokenizer; None: `auto`.

    Raises:
        TooLong: Instruction and response alone do not fit.
        DataError: Empty response, a plain frame for a tokenizer without EOS, or as `Template.of`.
    """
    chosen = template or Template.of("auto", tokenizer)
    return _row(example, [], *_tokens([example.turns()], chosen)[0], chosen, max_length)


def encode_all(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    embed: Callable[[Sequence[str]], Sequence[Sequence[float]]] | None = None,
    folder: Path | None = None,
    template: Template | None = None,
) -> Encoding:
    """`encode` of every example that fits `max_length` tokens, and a count of what was cut and dropped.

    Args:
        examples: Read once, a thousand at a time.
        tokenizer: The model's.
        max_length: Tokens.
        embed: Makes each row's `gate_embedding` of its instruction.
        folder: Where the rows are written and memory-mapped from; None: a list of them.
        template: Of this tokenizer; None: `auto`.

    Raises:
        NoneFits: There are examples, and none of them fits.
        DataError: As `encode`; also if there is no example, or the folder cannot hold the rows.
    """
    chosen = template or Template.of("auto", tokenizer)
    cut: list[int] = []
    kept: list[int] = []
    too_long: dict[int, int] = {}
    shortest: list[TooLong] = []  # of those that do not fit

    def rows() -> Iterator[Encoded]:
        for start in range(0, len(examples), BATCH):
            some = examples[start : start + BATCH]
            vectors = torch.tensor(embed([each.instruction for each in some])) if embed else [None] * len(some)
            tokens = _tokens([each.turns() for each in some], chosen, start)
            for number, (each, found) in enumerate(zip(some, tokens, strict=True)):
                try:
                    row = _row(each, [], *found, chosen, max_length)
                except TooLong as error:
                    too_long[start + number] = error.tokens
                    if not shortest or error.tokens < shortest[0].tokens:
                        shortest[:] = [error.with_traceback(None)]
                    continue
                kept.append(start + number)
                if row.tokens_cut:
                    cut.append(row.tokens_cut)
                yield replace(row, gate_embedding=vectors[number])

    found = list(rows()) if folder is None else store(rows(), ROWS, _parts, _restored, folder)
    if not found and shortest:
        raise NoneFits(f"none of {len(examples)} examples fits: {shortest[0]}", list(too_long.values()))
    if not found:
        raise DataError("no examples to encode")
    return Encoding(found, Truncation(len(cut), len(too_long), sum(cut)), kept, too_long)


def few_shot(
    example: Example,
    shots: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    template: Template | None = None,
) -> Encoded:
    """Solved examples before the prompt of `example`, as earlier turns; loss on its response and the end of it only.

    In the plain frame these are the episodes of pretraining. Where `max_length` is short the first shots are left out;
    `shots` and `tokens_cut` of the row say so.

    Raises:
        TooLong: Not even `example` alone fits.
        DataError: As `encode`.
    """
    chosen = template or Template.of("auto", tokenizer)
    _check_responses(shots)

    def row(count: int) -> Encoded:
        solved = [turn for shot in shots[len(shots) - count :] for turn in shot.turns()]
        return _row(example, solved, *_tokens([[*solved, *example.turns()]], chosen)[0], chosen, 2**62)

    whole, kept = row(len(shots)), len(shots)
    found = whole
    while kept and len(found.input_ids) > max_length:
        kept -= 1
        found = row(kept)
    if len(found.input_ids) > max_length:
        found = encode(example, tokenizer, max_length, chosen)
    return replace(found, tokens_cut=len(whole.input_ids) - len(found.input_ids), shots=kept)


def prompts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    template: Template | None = None,
) -> dict[str, Int[Tensor, "batch length"]]:
    """A batch to generate from: `input_ids`, `attention_mask` and `gate_mask`, padded on the left.

    `gate_mask` is 1 on tokens of the user's own text, and left out where the tokenizer cannot say which those are. A
    prompt longer than `max_length` tokens loses the end of its context.

    Raises:
        TooLong: An instruction alone does not fit.
        DataError: No examples, or a tokenizer that has neither a padding nor an EOS token.
    """
    if not examples:
        raise DataError("no examples to make prompts of: give one at least")
    pad, chosen = _pad_id(tokenizer), template or Template.of("auto", tokenizer)
    rows = chosen.prompts([example.turns() for example in examples])
    if max_length is not None:
        rows = [
            row if len(row.input_ids) <= max_length else _shorten(example, [], chosen, max_length, 0)
            for row, example in zip(rows, examples, strict=True)
        ]
    ids, masks = [row.input_ids for row in rows], [row.gate_mask for row in rows if row.gate_mask is not None]
    batch = {
        "input_ids": padded(ids, pad, "left"),
        "attention_mask": padded([[1] * len(row) for row in ids], 0, "left"),
    }
    return batch | {"gate_mask": padded(masks, 0, "left")} if masks else batch


def pack(
    rows: Sequence[Encoded],
) -> dict[str, Int[Tensor, " _"] | Bool[Tensor, " _"] | Float[Tensor, "segments width"]]:
    """Rows laid end to end, without padding: `input_ids` and `labels` [tokens], `lengths` and `headers` [segments].

    `gate_mask` [tokens], true on what the gate may read, where the rows have one; `pooled` [segments, width] where they
    carry a gate embedding.

    Raises:
        DataError: Only some of the rows carry one.
    """
    batch = {
        "input_ids": torch.tensor([token for row in rows for token in row.input_ids]),
        "labels": torch.tensor([label for row in rows for label in row.labels]),
        "lengths": torch.tensor([len(row.input_ids) for row in rows]),
        "headers": torch.tensor([row.header for row in rows]),
    }
    if masks := _masks(rows):
        batch["gate_mask"] = torch.tensor([bool(each) for mask in masks for each in mask])
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
        ConfigError: A tokenizer that has neither a padding nor an EOS token; a padding side that is neither left nor
            right; rows of which only some carry a gate embedding.
    """

    tokenizer: PreTrainedTokenizerBase
    padding_side: str = "right"  # or "left"
    pad_to_multiple_of: int | None = None  # tokens
    gate_mask: bool = False  # hand on what a gate may read; models without a gate do not know the word

    def __post_init__(self) -> None:
        self.pad_id = _pad_id(self.tokenizer)
        if self.padding_side not in ("left", "right"):
            raise ConfigError(f"padding_side={self.padding_side!r}: choose 'left' or 'right'")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ConfigError(f"pad_to_multiple_of={self.pad_to_multiple_of}: choose 1 or more tokens, or None")

    def __call__(
        self, rows: Sequence[Encoded]
    ) -> dict[str, Int[Tensor, "batch length"] | Float[Tensor, "batch width"]]:
        """`input_ids`, `attention_mask` and `labels`; `gate_embedding` where the rows carry one."""
        ids, side, multiple = [row.input_ids for row in rows], self.padding_side, self.pad_to_multiple_of or 1
        batch = {
            "input_ids": padded(ids, self.pad_id, side, multiple),
            "attention_mask": padded([[1] * len(row) for row in ids], 0, side, multiple),
            "labels": padded([row.labels for row in rows], IGNORED, side, multiple),
        }
        if self.gate_mask and (masks := _masks(rows)):
            batch["gate_mask"] = padded(masks, 0, side, multiple)
        embeddings = _embeddings(rows)
        return batch if embeddings is None else batch | {"gate_embedding": embeddings}


def _embeddings(rows: Sequence[Encoded]) -> Float[Tensor, "rows width"] | None:
    found = [row.gate_embedding for row in rows if row.gate_embedding is not None]
    return torch.stack(found) if _all_or_none(found, rows, "gate_embedding") else None


def _masks(rows: Sequence[Encoded]) -> list[list[int]]:
    found = [row.gate_mask for row in rows if row.gate_mask is not None]
    return found if _all_or_none(found, rows, "gate_mask") else []


def _all_or_none(found: Sequence[Any], rows: Sequence[Encoded], name: str) -> bool:
    if 0 < len(found) < len(rows):
        raise DataError(f"{len(found)} of {len(rows)} rows carry a {name}: give one to all or to none")
    return bool(found)


def _row(
    example: Example, solved: Turns, prompt: Prompt, response: list[int], template: Template, max_length: int
) -> Encoded:
    whole = len(prompt.input_ids)
    if whole + len(response) > max_length:
        prompt = _shorten(example, solved, template, max_length, len(response))
    ids = prompt.input_ids
    mask = None if prompt.gate_mask is None else prompt.gate_mask + [0] * len(response)
    return Encoded(ids + response, [IGNORED] * len(ids) + response, example.category, whole - len(ids),
                   gate_mask=mask, header=prompt.header)  # fmt: skip


def _shorten(example: Example, solved: Turns, template: Template, max_length: int, reserved: int) -> Prompt:
    """A prompt with as much of the context's beginning as `max_length - reserved` tokens hold."""

    def turns(characters: int) -> Turns:
        return [*solved, *replace(example, context=example.context[:characters]).turns()]

    # Cutting characters and tokenising again, not cutting tokens: a row is always some example's own tokenisation.
    lengths = range(len(example.context) + 1)
    characters = bisect_right(lengths, max_length - reserved, key=lambda n: template.count(turns(n))) - 1
    if characters < 0:
        what, tokens = "instruction and response" if reserved else "instruction", template.count(turns(0)) + reserved
        raise TooLong(
            f"{what} take {tokens} tokens without any context, but max_length={max_length}: raise max_length or "
            f"shorten the example ({example.instruction[:60]!r})",
            tokens,
        )
    return template.prompts([turns(characters)])[0]


def _parts(row: Encoded) -> tuple[Any, ...]:
    vector = None if row.gate_embedding is None else row.gate_embedding.numpy()
    return row.input_ids, row.labels, row.category, row.tokens_cut, row.shots, vector, row.gate_mask, row.header


def _restored(ids: list[int], labels: list[int], category: str, cut: int, shots: int, vector: Any,
              mask: list[int] | None, header: int) -> Encoded:  # fmt: skip
    embedding = None if vector is None else torch.tensor(vector)
    return Encoded(ids, labels, category, cut, shots, embedding, mask, header)


def _tokens(conversations: Sequence[Turns], template: Template, first: int = 0) -> list[tuple[Prompt, list[int]]]:
    """Prompt and response of each conversation's last turn, the first one being number `first`."""
    _check_responses([turns[-1] for turns in conversations], first)
    return template.rows(conversations)


def _check_responses(examples: Sequence[Example], first: int = 0) -> None:
    for index, example in enumerate(examples, first):
        if not example.response.strip():
            raise DataError(f"example {index} ({example.instruction[:60]!r}) has an empty response, so nothing to "
                            "learn: write one or leave the example out")  # fmt: skip


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """EOS fills in for a missing padding token: mask and labels say what is padding, so its id never matters."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad is None:
        name = type(tokenizer).__name__
        raise BaseModelError(f"{name} has neither a padding nor an EOS token: set tokenizer.pad_token")
    return int(pad)


def padded(rows: Sequence[list[int]], fill: int, side: str, multiple: int = 1) -> Int[Tensor, "batch length"]:
    """Rows as one tensor, filled up on one side to the longest of them."""
    length = -(-max(map(len, rows)) // multiple) * multiple
    gaps = [[fill] * (length - len(row)) for row in rows]
    pairs = zip(rows, gaps, strict=True)
    return torch.tensor([gap + row if side == "left" else row + gap for row, gap in pairs], dtype=torch.int64)
