"""Each answer of a batch is the one that is given alone; who answers, and where it ends, each row says for itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smartmops.evaluation.perplexity import answer
from smartmops.rows.example import Example
from smartmops.serving.answering import Answer, Answerer, Settings, tasks_of
from smartmops.serving.slots import Spoken, drawn
from two_tasks import GREEDY, LONG, SHORT, mixed


@pytest.mark.parametrize(
    "settings", [GREEDY, Settings(12, temperature=1.0, top_p=0.9, seed=7)], ids=["greedy", "drawn"]
)
def test_answers_of_one_batch_are_those_given_alone(answerer: Answerer, settings: Settings) -> None:
    together = answerer.answer(mixed(answerer, settings))
    alone = [answerer.answer([question])[0] for question in mixed(answerer, settings)]
    assert [(each.text, each.tokens, each.ended) for each in together] == [
        (each.text, each.tokens, each.ended) for each in alone
    ]
    for one, two in zip(together, alone, strict=True):
        assert one.weights == pytest.approx(two.weights, abs=2e-4)


def test_the_gate_and_the_base_answer_as_they_do_elsewhere(answerer: Answerer) -> None:
    model, tokenizer, template = answerer.model, answerer.tokenizer, answerer.template
    found = answerer.answer([answerer.ask(SHORT, GREEDY), answerer.ask(SHORT, GREEDY, base=True)])
    assert [found[0].text] == answer(model, tokenizer, [SHORT], 12, template)
    with model.disable_adapter():
        assert [found[1].text] == answer(model, tokenizer, [SHORT], 12, template)
    assert sum(found[0].weights.values()) + found[0].left_to_base == pytest.approx(1, abs=1e-3)
    assert (found[1].weights, found[1].left_to_base) == ({}, 1.0)


def test_one_expert_answers_alone_where_it_is_named(answerer: Answerer) -> None:
    found = answerer.answer([answerer.ask(SHORT, GREEDY, expert=name) for name in answerer.experts])
    assert [each.weights for each in found] == [{"apple": 1.0, "banana": 0.0}, {"apple": 0.0, "banana": 1.0}]
    assert [each.left_to_base for each in found] == [0.0, 0.0]
    with pytest.raises(ValueError, match="'pear' is no expert of this run: choose one of apple, banana"):
        answerer.ask(SHORT, GREEDY, expert="pear")


def test_a_run_that_leaves_all_to_the_base_still_answers_by_a_named_expert(answerer: Answerer) -> None:
    config = answerer.model.peft_config["default"]
    before = (config.null_expert, config.null_threshold)
    config.null_expert, config.null_threshold = True, 0.0
    try:
        left, named = answerer.answer([answerer.ask(SHORT, GREEDY), answerer.ask(SHORT, GREEDY, expert="apple")])
        (base,) = answerer.answer([answerer.ask(SHORT, GREEDY, base=True)])
    finally:
        config.null_expert, config.null_threshold = before
    (own,) = answerer.answer([answerer.ask(SHORT, GREEDY, expert="apple")])
    assert (left.text, left.left_to_base) == (base.text, 1.0)
    assert (named.text, named.left_to_base) == (own.text, 0.0)


def test_seeds_draw_differently_and_a_narrow_draw_is_greedy(answerer: Answerer) -> None:
    hot = Settings(12, temperature=1.5)
    texts = {answerer.answer([answerer.ask(SHORT, replace(hot, seed=seed))])[0].text for seed in range(4)}
    assert len(texts) > 1
    narrow, greedy = answerer.answer([answerer.ask(SHORT, replace(hot, top_p=1e-6)), answerer.ask(SHORT, GREEDY)])
    assert narrow.text == greedy.text


def test_pieces_are_the_text_and_a_cancelled_row_lets_others_go_on(answerer: Answerer) -> None:
    pieces: list[str] = []
    gone, stays = answerer.ask(SHORT, GREEDY), answerer.ask(LONG, GREEDY, on_text=pieces.append)
    gone.on_text = lambda piece: setattr(gone, "cancelled", True)
    first, second = answerer.answer([gone, stays])
    assert (first.ended, second.ended, second.tokens) == ("cancelled", "length", 12)
    assert first.tokens < 12 and "".join(pieces) == second.text
    assert second.text == answerer.answer([answerer.ask(LONG, GREEDY)])[0].text


def test_what_does_not_fit_is_refused_with_the_numbers(answerer: Answerer) -> None:
    with pytest.raises(ValueError, match=r"the prompt takes \d+ tokens, and of the model's 256 positions none is left"):
        answerer.ask(Example("word " * 300, "", ""), GREEDY)
    with pytest.raises(ValueError, match="the prompt is empty"):
        answerer.complete("", GREEDY)
    (found,) = answerer.answer([answerer.ask(SHORT, Settings(10**6))])
    assert found.ended in ("length", "stop") and found.tokens < 256


def spoken(answerer: Answerer, text: str, ended: bool = True, **settings: object) -> tuple[list[str], Answer]:
    """An answer of these very words."""
    pieces: list[str] = []
    each = Spoken(answerer.ask(SHORT, Settings(200, **settings), on_text=pieces.append), answerer)  # type: ignore[arg-type]
    ids = answerer.tokenizer(text, add_special_tokens=False)["input_ids"] + [answerer.tokenizer.eos_token_id] * ended
    for token in ids:
        if each.ended is None:
            each.add(token)
    return pieces, each.end("length")


def test_an_answer_ends_at_its_turns_end_without_blanks_around_it(answerer: Answerer) -> None:
    pieces, found = spoken(answerer, "\n It is é — so. \n")
    assert (found.text, found.ended, "".join(pieces)) == ("It is é — so.", "stop", "It is é — so.")
    assert not any("\ufffd" in piece for piece in pieces), "no half characters"


def test_an_answer_ends_before_a_stop_and_no_piece_holds_part_of_one(answerer: Answerer) -> None:
    pieces, found = spoken(answerer, "one two\nUser: three", stop=("\nUser:",))
    assert (found.text, found.ended, "".join(pieces)) == ("one two", "stop", "one two")
    pieces, found = spoken(answerer, "one two\nUse it", stop=("\nUser:",))
    assert (found.text, "".join(pieces)) == ("one two\nUse it",) * 2


def test_a_run_without_experts_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = json.loads((run / "config.json").read_text())
    stored["arguments"]["method"] = "oracle"

    class Told:
        config = stored

    from smartmops.serving import answering

    monkeypatch.setattr(answering, "load_run", lambda path: (None, None, Told()))
    with pytest.raises(ValueError, match="method 'oracle', which is told which expert to use: give a run of"):
        Answerer.open(run)


def test_weights_that_are_no_shares_are_refused(answerer: Answerer) -> None:
    ids = torch.tensor([[1, 5, 6]])
    for weights, said in (([[0.5, 0.2]], "no shares"), ([[1.0]], "of shape"), ([[float("nan"), 1.0]], "no shares")):
        with pytest.raises(ValueError, match=said):
            answerer.model.generate(input_ids=ids, max_new_tokens=1, gate_weights=torch.tensor(weights))


def test_tasks_of_experts_are_read_from_the_gates_that_a_run_kept_unless_its_experts_are_others() -> None:
    gates = {"experts": ["a", "b"], "during": {"x": [1.0, 0.0]}, "after": {"x": [0.25, 0.75], "y": [0.5, 0.5]}}
    assert tasks_of(gates, ["a", "b"]) == {"a": {"y": 0.5, "x": 0.25}, "b": {"x": 0.75, "y": 0.5}}
    assert list(tasks_of(gates, ["a", "b"])["a"]) == ["y", "x"]
    assert tasks_of(gates, ["a", "c"]) == tasks_of({}, ["a"]) == {}
    assert tasks_of(gates | {"after": {}}, ["a", "b"]) == {"a": {"x": 1.0}, "b": {"x": 0.0}}


def test_what_is_drawn_does_not_hang_on_which_of_two_alike_is_ahead() -> None:
    """Beside other rows of a batch, 16-bit logits that are nearly alike change places."""
    scores = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    ahead, behind = scores.clone(), scores.clone()
    ahead[3], behind[3] = scores[4] + 1e-9, scores[4] - 1e-9
    for settings in (Settings(temperature=1.0), Settings(temperature=0.7, top_p=0.9)):
        found = [[drawn(each, settings, torch.Generator().manual_seed(seed)) for seed in range(100)]
                 for each in (ahead, behind)]  # fmt: skip
        assert found[0] == found[1] and len(set(found[0])) > 10
    chances = torch.tensor([0.05, 0.6, 0.35]).log().double()
    source = torch.Generator().manual_seed(1)
    counts = torch.bincount(torch.tensor([drawn(chances, Settings(temperature=1.0), source) for _ in range(2000)]))
    assert (counts / 2000 - torch.tensor([0.05, 0.6, 0.35])).abs().max() < 0.04
