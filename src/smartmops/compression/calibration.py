"""DATA or plain text in, token rows to calibrate on and token rows to measure on out. Knows no weights.

The two never share an example or a stretch of text: of DATA, calibration sees the training split alone; of plain text,
all but the last tenth.
"""

from __future__ import annotations

import lzma
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from smartmops.checks.errors import ConfigError, DataError
from smartmops.data.tasks import splits
from smartmops.options.compression import TEXT_ENDINGS
from smartmops.rows.example import Example, of_examples
from smartmops.tokens.batches import Collator, Encoded, encode_all
from smartmops.tokens.template import prompt_text

PIECE = 20_000  # characters that are tokenised at once
LONGEST = 2048  # tokens of a sequence, where nobody asks for more
SHORTEST = 32  # tokens of a calibration sequence; below, most of its tokens have hardly any context
HELD_OUT = 0.1  # share of a plain text, at its end


@dataclass(frozen=True)
class Text:
    """Pieces of text to calibrate on, and what is held out: pieces of text, or examples whose responses count."""

    pieces: list[str]
    held_out: list[str] | list[Example]
    name: str

    @property
    def fingerprint(self) -> str:
        """What tells it from any other text, whatever file it came from."""
        return of_examples(self.pieces, self.held_out)


def load(
    data: str, limit: int | None = None, test_share: float = 0.1, seed: int = 0, base: str = "",
    columns: Sequence[str] = (),
) -> Text:  # fmt: skip
    """Read DATA or a plain text file (.txt, .raw, .md, or any .xz); documents end at `<|endoftext|>`.

    Args:
        data: What to read; empty: the office tasks, for the embedded base only.
        limit: As in `train`: use only so many examples.
        test_share: As in `train`: of each category.
        seed: As in `train`, where it draws the split.
        base: MODEL, which decides whether `data` may be empty.
        columns: As in `train`: `FIELD=COLUMN`.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    if not data and base != "tiny":
        raise ConfigError(f"no calibration text for {base}: give --calibration a text file, or the DATA it will serve")
    if data.endswith(TEXT_ENDINGS):
        return plain(data)
    train, test = splits(data or "office", limit, test_share, seed, columns=columns)
    return Text([_written(example) for example in train], list(test), data or "office")


def plain(file: str | Path) -> Text:
    """A plain text file, the last tenth held out.

    Raises:
        DataError: the file is missing, empty, or no UTF-8 text.
    """
    try:
        raw = Path(file).read_bytes()
        text = (lzma.decompress(raw) if str(file).endswith(".xz") else raw).decode()
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise DataError(f"calibration={str(file)!r} cannot be read ({error}): give UTF-8 text, plain or .xz") from error
    if not text.strip():
        raise DataError(f"calibration={str(file)!r} is empty: give a text file with text in it")
    cut = round(len(text) * (1 - HELD_OUT))
    return Text(list(_pieces(text[:cut])), list(_pieces(text[cut:])), str(file))


def calibration_rows(
    text: Text, tokenizer: Any, sequences: int, length: int | None, seed: int, most: int = LONGEST
) -> Int[Tensor, "sequences length"]:
    """Rows of tokens, from pieces in an order drawn from `seed`, laid end to end with EOS between.

    No padding, so none can enter the Hessian. `length` None: as many tokens a row as the text has, `most` at most.

    Raises:
        ConfigError, DataError: too little text, or a number of sequences or tokens that is none.
    """
    if sequences < 1:
        raise ConfigError(f"sequences={sequences}: choose 1 or more, such as 128")
    if length is not None:
        _check(length)
    order = list(text.pieces)
    random.Random(f"{seed} calibration").shuffle(order)
    tokens = _rows(order, tokenizer, sequences * (length or most))
    length = length or min(most, max(len(tokens) // sequences, SHORTEST))
    if (short := _short(text, tokens, sequences, length)) is not None:
        fewer = f", or choose --sequences up to {len(tokens) // length}" if len(tokens) >= length else ""
        raise DataError(short + fewer)
    return torch.tensor(tokens[: sequences * length]).view(sequences, length)


def check_enough(text: Text, tokenizer: Any, sequences: int) -> None:
    """Whether there are so many rows in a text, as short as they may be, and something to measure on.

    Raises:
        DataError: there are not; the message leaves the number of sequences as it is.
    """
    tokens = _rows(text.pieces, tokenizer, sequences * SHORTEST)
    if (short := _short(text, tokens, sequences, SHORTEST)) is not None:
        raise DataError(short)
    held_out_batches(text, tokenizer, LONGEST, most=1)


def _short(text: Text, tokens: Sequence[int], sequences: int, length: int) -> str | None:
    """What is wrong where a text has too few tokens."""
    if len(tokens) >= sequences * length:
        return None
    return (f"calibration={text.name!r} has {len(tokens)} tokens, but {sequences} sequences of {length} need "
            f"{sequences * length}: give more text")  # fmt: skip


def held_out_batches(
    text: Text, tokenizer: Any, length: int, batch_size: int = 8, most: int = 64
) -> list[dict[str, Tensor]]:
    """Right-padded batches with labels: responses of held-out examples, or at most `most` rows of held-out text.

    Raises:
        DataError: nothing is held out that fits.
    """
    _check(length)
    if text.held_out and isinstance(text.held_out[0], Example):
        rows = encode_all([e for e in text.held_out if isinstance(e, Example)], tokenizer, length).rows
    else:
        pieces = [piece for piece in text.held_out if isinstance(piece, str)]
        tokens = _rows(pieces, tokenizer, most * length)[: most * length]
        cuts = range(0, max(len(tokens) - length, 0) + 1, length)
        rows = [Encoded(tokens[i : i + length], tokens[i : i + length]) for i in cuts if len(tokens) > 1]
    if not rows:
        raise DataError(f"{text.name!r} holds out no text to measure on: give more")
    collate, order = Collator(tokenizer), sorted(rows, key=lambda row: len(row.input_ids))
    return [collate(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]


def _check(length: int) -> None:
    if length < 2:  # the first token of a sequence is predicted from nothing, so one alone measures nothing
        raise ConfigError(f"sequence_length={length}: choose 2 tokens or more, such as 2048")


def _rows(pieces: Iterable[str], tokenizer: Any, enough: int) -> list[int]:
    """Tokens of the pieces, end to end, until there are enough."""
    tokens: list[int] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for piece in pieces:
        if len(tokens) >= enough:
            break
        tokens += tokenizer(piece, verbose=False)["input_ids"] + end
    return tokens


def _written(example: Example) -> str:
    return prompt_text(example) + example.response


def _pieces(text: str) -> Iterator[str]:
    for document in re.split(r"\s*<\|endoftext\|>\s*", text):
        for start in range(0, len(document), PIECE):
            if piece := document[start : start + PIECE].strip():
                yield piece
