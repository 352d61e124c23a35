"""What many texts begin with: the best of all choices, and the same states as of each text by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from cached import VOCABULARY, adapted, base, made_up, over
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, MistralConfig

from smartmops.states import instructions as reading
from smartmops.states.answer_states import AnswerStates
from smartmops.states.instructions import instructions, layer_means
from smartmops.states.openings import openings
from smartmops.tokens.batches import IGNORED, Encoded

ANSWERS: dict[str, Any] = {"experts": "keys_values", "visible_to": "answers"}
WHOLE = 10**6  # tokens that a beginning must have, so that there is none
SHAPE: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
BASES: dict[str, Any] = {
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4),
    "gpt-neox": GPTNeoXConfig(**SHAPE, intermediate_size=48),
    "sliding window": MistralConfig(**SHAPE, num_key_value_heads=2, intermediate_size=48, sliding_window=9),
}


def beginning_alike() -> list[Encoded]:
    """Rows of which three begin with 20 tokens, three with 17, and two with nothing in common."""
    rows = made_up()
    torch.manual_seed(5)
    one, two = (torch.randint(3, VOCABULARY, (n,)).tolist() for n in (20, 17))
    fronts = [(one, two, [])[i % 3] for i in range(len(rows))]
    return [replace(row, input_ids=front + row.input_ids, labels=[IGNORED] * len(front) + row.labels)
            for front, row in zip(fronts, rows, strict=True)]  # fmt: skip


def best(texts: Sequence[Sequence[int]], least: int) -> int:
    """Tokens saved by the best of all choices of beginnings, by looking at each of them."""
    every = sorted({tuple(text[:n]) for text in texts for n in range(least, len(text) + 1)})

    def saved(at: int, chosen: tuple[tuple[int, ...], ...]) -> Iterator[int]:
        yield sum((sum(tuple(text[: len(one)]) == one for text in texts) - 1) * len(one) for one in chosen)
        for i in range(at, len(every)):
            if not any(every[i][: len(one)] == one for one in chosen):  # sorted: no later one is part of an earlier
                yield from saved(i + 1, (*chosen, every[i]))

    return max(saved(0, ()))


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(model(packed=batch).loss, trained))


@given(st.lists(st.lists(st.integers(0, 1), max_size=4), max_size=5), st.integers(1, 3))
def test_no_other_choice_saves_more(texts: list[list[int]], least: int) -> None:
    found = openings(texts, least)
    for text, number in zip(texts, found.of, strict=True):
        if number is not None:
            opening = found.tokens[number]
            assert text[: len(opening)] == opening and len(opening) >= least
    went = sum(len(found.tokens[number]) for number in found.of if number is not None)
    assert went - sum(map(len, found.tokens)) == best(texts, least)


def test_states_are_those_of_each_row_by_itself() -> None:
    rows, model = beginning_alike(), adapted(**ANSWERS)
    alone, shared = AnswerStates(model, rows, least=WHOLE), AnswerStates(model, rows)
    begun = [0 if number is None else len(shared.shared.tokens[number]) for number in shared.shared.of]
    assert begun == [20, 17, 0, 20, 17, 0, 20, 17] and alone.shared.tokens == []
    want, got = alone.batch(range(8)), shared.batch(range(8))
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-6)
    assert shared.kept < alone.kept, "beginnings are kept once"
    for mine, theirs in zip(gradients(model, got), gradients(model, want), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", BASES)
def test_on_other_architectures_too(shape: str) -> None:
    torch.manual_seed(0)
    frozen = AutoModelForCausalLM.from_config(BASES[shape]).requires_grad_(False).eval()
    for parameter in frozen.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    rows, model = beginning_alike(), over(frozen, **ANSWERS)
    want, got = (model.base_model.nats(AnswerStates(model, rows, least=n).batch(range(8))) for n in (WHOLE, 16))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [*BASES, "llama"])
def test_what_enters_every_layer_is_what_transformers_shows(shape: str) -> None:
    torch.manual_seed(0)
    frozen = base() if shape == "llama" else AutoModelForCausalLM.from_config(BASES[shape]).eval()
    rows = beginning_alike()
    rows[3] = replace(rows[3], gate_mask=[0] * 5 + [1] * (len(rows[3].input_ids) - 5))
    rows = [row if row.gate_mask else replace(row, gate_mask=[1] * len(row.input_ids)) for row in rows]
    got = layer_means(frozen, rows, budget=60)
    for i, row in enumerate(rows):
        count = row.labels.count(IGNORED)
        with torch.no_grad():
            hidden = frozen(torch.tensor([row.input_ids[:count]]), output_hidden_states=True).hidden_states[:-1]
        read = torch.tensor((row.gate_mask or [])[:count]).bool()
        torch.testing.assert_close(got[:, i], torch.stack([h[0, read].mean(0) for h in hidden]), rtol=1e-4, atol=1e-5)
    assert not hasattr(frozen, "mops_engine"), "the base is left as it was"


def test_rows_that_one_trains_on_are_computed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, model = beginning_alike(), adapted(**ANSWERS)
    together, answers = list[int](), type(model.base_model).answers
    monkeypatch.setattr(type(model.base_model), "answers", lambda self, batch, begun: (
        together.append(len(batch["lengths"])), answers(self, batch, begun))[1])  # fmt: skip
    states = AnswerStates(model, rows)
    states([5, 2, 7])
    assert together == [1, 1, 1]
    states.batch(range(8))
    assert sum(together) == 8 and max(together) > 1, "what is only measured is computed together"


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_gate_reads_the_same_at_any_layer(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, model = beginning_alike(), adapted(gate_layer=layer, **ANSWERS)
    states = AnswerStates(model, rows)
    got = [instructions(model, rows), states.batch(range(8))["pooled"]]
    monkeypatch.setattr(reading, "openings", lambda texts: openings(texts, WHOLE))
    want = instructions(model, rows)
    for each in got:
        torch.testing.assert_close(each, want, rtol=0, atol=1e-6)


def test_another_adapters_gate_layer_is_read_from_what_is_kept() -> None:
    rows, first = beginning_alike(), adapted(gate_layer=1, **ANSWERS)
    states = AnswerStates(first, rows)
    states.batch(range(4))
    frozen, kept = first.base_model.unload(), states.kept
    states.model = over(frozen, gate_layer=3, **ANSWERS)
    got = states.batch(range(8))["pooled"]
    torch.testing.assert_close(got, AnswerStates(states.model, rows, least=WHOLE).batch(range(8))["pooled"],
                               rtol=0, atol=1e-6)  # fmt: skip
    assert states.kept > kept


@pytest.mark.parametrize("room", [0, 9_000, 30_000])
def test_without_room_for_all_the_states_are_the_same(room: int) -> None:
    rows, model = beginning_alike(), adapted(**ANSWERS)
    little, want = AnswerStates(model, rows, room=room), AnswerStates(model, rows, least=WHOLE)
    for _ in range(2):
        for chosen in ([0, 1, 2], [7, 3], [4, 5, 6, 0]):
            got = little.batch(chosen)
            for name, value in want.batch(chosen).items():
                torch.testing.assert_close(got[name], value, rtol=0, atol=1e-6)
    assert little.kept <= room


def test_what_rows_begin_with_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, model, calls = beginning_alike(), adapted(**ANSWERS), list[int]()
    real = type(model.base_model).opening
    monkeypatch.setattr(type(model.base_model), "opening",
                        lambda self, tokens, whole=True: (calls.append(len(tokens)), real(self, tokens, whole))[1])  # fmt: skip
    states = AnswerStates(model, rows)
    for i in range(8):
        states.batch([i])
    assert sorted(calls) == [17, 20]


def test_a_process_that_is_sent_rows_opens_what_they_begin_with() -> None:
    rows, model = beginning_alike(), adapted(**ANSWERS)
    sender, taker = AnswerStates(model, rows), AnswerStates(model, rows, room=0)
    want = sender.batch(range(8))
    taker._found, taker._read = dict(sender._found), dict(sender._read)
    for name, value in taker.batch(range(8)).items():
        torch.testing.assert_close(value, want[name], rtol=0, atol=1e-6)
