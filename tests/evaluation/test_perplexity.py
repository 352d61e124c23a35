"""Perplexity is the same however rows are batched, and no batch holds more logits than it must."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from smartmops.evaluation import perplexity
from smartmops.tokens.batches import Collator, Encoded


def base() -> Any:
    torch.manual_seed(0)
    shape = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(shape).eval()


def rows(lengths: list[int]) -> list[Encoded]:
    ids = [torch.randint(3, 50, (length,)).tolist() for length in lengths]
    return [Encoded(each, [-100, -100, *each[2:]], f"task {len(each) % 2}") for each in ids]


@pytest.fixture
def collator(tokenizer: PreTrainedTokenizerFast) -> Collator:
    return Collator(tokenizer)


def test_every_token_counts_once_whatever_the_batches(collator: Collator, monkeypatch: pytest.MonkeyPatch) -> None:
    model, own = base(), rows([5, 9, 30, 4, 30, 12, 7])
    by_hand: dict[str, list[float]] = {"task 0": [], "task 1": []}
    for row in own:
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        by_hand[row.category] += [-float(logs[at - 1, row.input_ids[at]]) for at in range(2, len(row.input_ids))]
    wanted = {task: math.exp(sum(nats) / len(nats)) for task, nats in by_hand.items()}
    for most in (1, 40, 4096):
        monkeypatch.setattr(perplexity, "PADDED", most)
        found = perplexity.evaluate(model, own, collator)
        assert found.per_task == pytest.approx(wanted, rel=1e-5)
        assert found.tokens == {task: len(nats) for task, nats in by_hand.items()}


def test_long_rows_come_in_smaller_batches(collator: Collator, monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes = base(), list[tuple[int, int]]()
    model.register_forward_pre_hook(
        lambda _, __, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    monkeypatch.setattr(perplexity, "PADDED", 100)
    perplexity.evaluate(model, rows([120, 40, 45, 50, 8, 8, 8, 8, 8, 8]), collator, batch_size=4)
    assert sum(count for count, _ in shapes) == 10
    assert all(count == 1 or (count <= 4 and count * length <= 100) for count, length in shapes), shapes
    assert (4, 8) in shapes and (1, 120) in shapes
