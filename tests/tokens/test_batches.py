"""Encoding, truncation, padding: the response is never cut, the instruction never learnt."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import processors
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast as Tokenizer

from smartmops.data.tasks import read, sample
from smartmops.rows.example import Example
from smartmops.rows.office import episode
from smartmops.tokens.batches import (
    IGNORED,
    Collator,
    Encoded,
    TooLong,
    Truncation,
    encode,
    encode_all,
    few_shot,
    prompts,
)
from smartmops.tokens.template import prompt_text

Make = Callable[..., Tokenizer]
EXAMPLE = Example("Name it.", "A text about a cat.", "The cat", "closed_qa")
text = st.text(st.characters(codec="utf-8"), max_size=40)
examples = st.builds(Example, instruction=text, context=text, response=text.filter(str.strip), category=text)


def alone(example: Example, tokenizer: Tokenizer) -> int:
    return len(encode(replace(example, context=""), tokenizer, 10_000).input_ids)


def test_the_template_to_the_letter() -> None:
    assert prompt_text(EXAMPLE) == "### Instruction:\nName it.\n\n### Context:\nA text about a cat.\n\n### Response:\n"
    assert prompt_text(replace(EXAMPLE, context="")) == "### Instruction:\nName it.\n\n### Response:\n"


@given(examples)
def test_loss_is_on_response_and_eos_only(tokenizer: Tokenizer, example: Example) -> None:
    row = encode(example, tokenizer, 10_000)
    learnt = [token for token in row.labels if token != IGNORED]
    prompt = row.input_ids[: len(row.input_ids) - len(learnt)]
    assert row.labels == [IGNORED] * len(prompt) + learnt
    assert learnt == [*tokenizer(example.response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert prompt == tokenizer(prompt_text(example))["input_ids"] and prompt[0] == tokenizer.bos_token_id
    assert (row.category, row.tokens_cut) == (example.category, 0)


@given(examples, st.integers(1, 150))
def test_too_long_costs_the_end_of_the_context_only(tokenizer: Tokenizer, example: Example, max_length: int) -> None:
    whole = encode(example, tokenizer, 10_000)
    if alone(example, tokenizer) > max_length:
        with pytest.raises(
            TooLong, match=f"take {alone(example, tokenizer)} tokens .*max_length={max_length}: raise max_length or"
        ):
            encode(example, tokenizer, max_length)
        return
    row = encode(example, tokenizer, max_length)
    assert len(row.input_ids) == len(row.labels) == len(whole.input_ids) - row.tokens_cut <= max_length
    shorter = [replace(example, context=example.context[:n]) for n in range(len(example.context), -1, -1)]
    longest = next(e for e in shorter if len(encode(e, tokenizer, 10_000).input_ids) <= max_length)
    assert len(encode(longest, tokenizer, 10_000).input_ids) - len(row.input_ids) in range(3)  # merges are not monotone
    assert row.input_ids in [encode(e, tokenizer, 10_000).input_ids for e in shorter]


def test_truncation_is_counted_and_reported(tokenizer: Tokenizer) -> None:
    long = replace(EXAMPLE, context="word " * 50)
    hopeless = replace(EXAMPLE, response="word " * 50)
    limit = alone(EXAMPLE, tokenizer) + 30
    encoding = encode_all([EXAMPLE, long, hopeless, long], tokenizer, limit)
    cut = len(encode(long, tokenizer, 10_000).input_ids) - len(encoding.rows[1].input_ids)
    assert encoding.kept == [0, 1, 3] and cut > 0
    assert encoding.rows == [encode(e, tokenizer, limit) for e in (EXAMPLE, long, long)]
    assert encoding.truncation == Truncation(shortened=2, dropped=1, tokens_cut=2 * cut)
    assert str(encoding.truncation).startswith(
        f"2 examples lost the end of their context ({2 * cut} tokens), 1 dropped"
    )
    with pytest.raises(ValueError, match="none of 2 examples fits: instruction and response take"):
        encode_all([hopeless] * 2, tokenizer, limit)
    with pytest.raises(ValueError, match="no examples to encode"):
        encode_all([], tokenizer, limit)


def test_empty_response_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"example 1 \('Name it\.'\) has an empty response.*: write one or leave"):
        encode_all([EXAMPLE, replace(EXAMPLE, response=" ")], tokenizer, 100)
    with pytest.raises(ValueError, match=r"example 0 .* has an empty response"):
        encode(replace(EXAMPLE, response=""), tokenizer, 100)


def test_a_tokenizer_that_ends_texts_with_eos_does_not_end_prompts(make_tokenizer: Make, tokenizer: Tokenizer) -> None:
    ending = make_tokenizer()
    special = [("<bos>", 1), ("<eos>", 2)]
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=special
    )
    assert ending("a")["input_ids"][-1] == ending.eos_token_id
    assert encode(EXAMPLE, ending, 100) == encode(EXAMPLE, tokenizer, 100)
    assert few_shot(EXAMPLE, [EXAMPLE], ending, 200) == few_shot(EXAMPLE, [EXAMPLE], tokenizer, 200)


# ---------------------------------------------------------------------------------------------------------- few shot
def episode_tokens(shots: list[Example], tokenizer: Tokenizer) -> list[int]:
    """The rows of pretraining, written down a second time."""
    ids = [tokenizer.bos_token_id]
    for e in shots:
        ids += tokenizer(prompt_text(e), add_special_tokens=False)["input_ids"]
        ids += [*tokenizer(e.response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return ids


@given(st.integers(0, 5), st.integers(0, 1000))
def test_few_shot_rows_are_the_episodes_of_pretraining(tokenizer: Tokenizer, k: int, seed: int) -> None:
    *shots, last = episode(random.Random(seed), k + 1)
    row = few_shot(last, shots, tokenizer, 10_000)
    assert row.input_ids == episode_tokens([*shots, last], tokenizer)
    assert [t for t in row.labels if t != IGNORED] == [
        t for t in encode(last, tokenizer, 10_000).labels if t != IGNORED
    ]
    assert row.labels.index(row.input_ids[-1]) == len(row.labels) - 1  # EOS is learnt once, at the end
    assert (row.shots, row.tokens_cut, len(row.labels)) == (k, 0, len(row.input_ids))


def test_few_shot_leaves_out_the_first_shots(tokenizer: Tokenizer) -> None:
    *shots, last = episode(random.Random(0), 5)
    limit = len(episode_tokens([*shots[2:], last], tokenizer))
    row = few_shot(last, shots, tokenizer, limit)
    assert row.input_ids == episode_tokens([*shots[2:], last], tokenizer) and row.shots == 2
    assert row.tokens_cut == len(episode_tokens(shots[:2], tokenizer)) - 1
    assert few_shot(last, shots, tokenizer, limit - 1).shots == 1


# ----------------------------------------------------------------------------------------------------------- padding
@given(st.lists(examples, min_size=1, max_size=4), st.sampled_from(["left", "right"]), st.sampled_from([None, 1, 8]))
def test_padding_comes_off_again(tokenizer: Tokenizer, batch: list[Example], side: str, multiple: int | None) -> None:
    rows = encode_all(batch, tokenizer, 10_000).rows
    made = Collator(tokenizer, side, multiple)(rows)
    longest, step = max(len(row.input_ids) for row in rows), multiple or 1
    assert {name: (t.dtype, t.shape) for name, t in made.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (torch.int64, (len(rows), (longest + step - 1) // step * step))
    )
    for i, row in enumerate(rows):
        mask = made["attention_mask"][i].bool()
        assert made["input_ids"][i][mask].tolist() == row.input_ids
        assert made["labels"][i][mask].tolist() == row.labels
        assert (made["labels"][i][~mask] == IGNORED).all() and (
            made["input_ids"][i][~mask] == tokenizer.pad_token_id
        ).all()
        assert mask[-1 if side == "left" else 0]


def test_collator_serves_a_data_loader_and_carries_gate_embeddings(tokenizer: Tokenizer) -> None:
    rows = encode_all([EXAMPLE, replace(EXAMPLE, context="")], tokenizer, 100).rows
    embedded = [replace(row, gate_embedding=torch.full((3,), float(i))) for i, row in enumerate(rows)]
    (batch,) = DataLoader(embedded, batch_size=2, collate_fn=Collator(tokenizer))
    assert batch["gate_embedding"].tolist() == [[0.0] * 3, [1.0] * 3]
    with pytest.raises(ValueError, match="1 of 2 rows carry a gate_embedding: give one to all or to none"):
        Collator(tokenizer)([rows[0], embedded[1]])


def test_tokenizers_without_padding_or_end(make_tokenizer: Make) -> None:
    no_pad, no_eos, neither = (
        make_tokenizer(**dict.fromkeys(names)) for names in (["pad_token"], ["eos_token"], ["pad_token", "eos_token"])
    )
    batch = Collator(no_pad)(encode_all([EXAMPLE, replace(EXAMPLE, context="")], no_pad, 100).rows)
    padding = batch["attention_mask"] == 0
    assert padding.any() and (batch["input_ids"][padding] == no_pad.eos_token_id).all()
    assert (batch["labels"][padding] == IGNORED).all()
    for function in (lambda: encode(EXAMPLE, no_eos, 100), lambda: few_shot(EXAMPLE, [], no_eos, 100)):
        with pytest.raises(ValueError, match=r"has no EOS token.*: set tokenizer\.eos_token"):
            function()
    for function in (lambda: Collator(neither), lambda: prompts([EXAMPLE], neither)):
        with pytest.raises(ValueError, match=r"neither a padding nor an EOS token: set tokenizer\.pad_token"):
            function()


def test_collator_options_out_of_range(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="padding_side='middle': choose 'left' or 'right'"):
        Collator(tokenizer, "middle")
    with pytest.raises(ValueError, match="pad_to_multiple_of=0: choose 1 or more tokens"):
        Collator(tokenizer, pad_to_multiple_of=0)


def test_signatures_are_checked_at_run_time(tokenizer: Tokenizer) -> None:
    from jaxtyping import TypeCheckError

    with pytest.raises(TypeCheckError):
        Encoded([1], [1], gate_embedding=torch.zeros(1, 3))
    with pytest.raises(TypeCheckError):
        encode(EXAMPLE, tokenizer, "100")


# -------------------------------------------------------------------------------------------------------- generation
@given(st.lists(examples, min_size=1, max_size=4), st.integers(20, 80))
def test_prompts_are_rows_without_response_padded_on_the_left(
    tokenizer: Tokenizer, batch: list[Example], max_length: int
) -> None:
    def tokens(example: Example) -> list[int]:
        return tokenizer(prompt_text(example))["input_ids"]

    assume(all(len(tokens(replace(e, context=""))) <= max_length for e in batch))
    for made, limit in ((prompts(batch, tokenizer), 10_000), (prompts(batch, tokenizer, max_length), max_length)):
        assert made["input_ids"].shape[1] <= limit and (made["attention_mask"][:, -1] == 1).all()
        for ids, mask, e in zip(made["input_ids"], made["attention_mask"].bool(), batch, strict=True):
            shorter = [tokens(replace(e, context=e.context[:n])) for n in range(len(e.context), -1, -1)]
            longest = next(row for row in shorter if len(row) <= limit)
            assert ids[mask].tolist() in shorter and len(longest) - mask.sum() in range(3)


def test_prompts_that_cannot_be_made(tokenizer: Tokenizer) -> None:
    with pytest.raises(TooLong, match=r"instruction take .* tokens without any context, but max_length=5"):
        prompts([EXAMPLE], tokenizer, 5)
    with pytest.raises(ValueError, match="no examples to make prompts of"):
        prompts([], tokenizer)


def test_real_rows_fit_and_end_with_their_response(tokenizer: Tokenizer, shared_data: Path) -> None:
    chosen = sample(read(str(shared_data / "dolly15k/dolly-15k.jsonl")), 300)
    encoding = encode_all(chosen, tokenizer, 512)
    assert encoding.truncation.shortened > 0 and encoding.truncation.dropped == 300 - len(encoding.rows) > 0
    for index, row in zip(encoding.kept, encoding.rows, strict=True):
        assert len(row.input_ids) <= 512
        learnt = [token for token in row.labels if token != IGNORED]
        assert tokenizer.decode(learnt[:-1]) == chosen[index].response
