"""Scores of greedy answers: the two measures against their definitions, batches against single answers, and whole runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from smartmops import cli
from smartmops.base import load_base
from smartmops.evaluation import answers
from smartmops.evaluation.answers import exact_match, questions, rouge_l, score
from smartmops.flow import steps, trainer
from smartmops.flow.trainer import TrainConfig, train
from smartmops.methods.baselines import MethodConfig, build
from smartmops.options.training import EMBEDDED_SETTING
from smartmops.reading.task import Task
from smartmops.rows.example import Example
from smartmops.runs.folder import Run

Make = Callable[..., TrainConfig]
PHRASES = st.lists(st.sampled_from(["a", "b", "c", "d2"]), max_size=7).map(" ".join)


@pytest.mark.parametrize(
    ("answer", "reference", "wanted"),
    [
        ("police killed the gunman", "police kill the gunman", 3 / 4),  # Lin (2004), section 3.1
        ("the gunman kill police", "police kill the gunman", 2 / 4),
        ("the gunman police killed", "police killed the gunman", 2 / 4),
        ("The cat, the CAT!", "the cat", 2 * 2 / (4 + 2)),
        ("don't", "don t", 1.0),  # split at everything but letters and digits
        ("", "police", 0.0),
        ("!?", "!?", 0.0),  # no words, as in rouge_score
    ],
)
def test_rouge_l_of_known_pairs(answer: str, reference: str, wanted: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(wanted)


def longest(one: Sequence[str], two: Sequence[str]) -> int:
    """Of all subsequences of `one`, the longest that is one of `two` too."""

    def within(part: Sequence[str]) -> bool:
        rest = iter(two)
        return all(word in rest for word in part)

    return max(size for size in range(len(one) + 1) if any(map(within, combinations(one, size))))


@given(PHRASES, PHRASES)
def test_rouge_l_is_an_f1_of_the_longest_common_subsequence(answer: str, reference: str) -> None:
    one, two = answer.split(), reference.split()
    assume(one and two)
    common = longest(one, two)
    precision, recall = common / len(one), common / len(two)
    wanted = 2 * precision * recall / (precision + recall) if common else 0.0
    assert rouge_l(answer, reference) == pytest.approx(wanted)


@given(st.text(max_size=40), st.text(max_size=40))
@example("İ", "i̇")
def test_rouge_l_is_a_share_the_same_both_ways_and_one_for_equals(answer: str, reference: str) -> None:
    found = rouge_l(answer, reference)
    assert 0 <= found <= 1
    assert found == rouge_l(reference, answer)
    assert rouge_l(f"{answer} word", f"{answer} word") == 1


@given(st.text(max_size=40), st.text(max_size=40))
def test_exact_match_forgives_case_punctuation_and_blanks_only(answer: str, reference: str) -> None:
    assert exact_match(answer, answer)
    assert exact_match(answer, reference) == exact_match(reference, answer)
    assert exact_match(f"  {answer}!?\n", f"{answer}.")
    assert not exact_match(f"{answer} word", f"{answer} words")


def test_exact_match_of_known_pairs() -> None:
    assert exact_match("The  answer: 42.", "the answer 42")
    assert not exact_match("the answer 42", "answer 42"), "articles stay"


EXAMPLES = [
    Example(f"Name {'the ' * (i % 4)}thing {'over there ' * (i % 3)}of number {i}.", "", "A thing.", "ab"[i % 2])
    for i in range(9)
]


@pytest.mark.parametrize("method", ["mops", "prompt-tuning", "input-prompt-tuning", "lora", "ia3"])
def test_batches_of_any_method_answer_as_one_example_at_a_time(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tokenizer = load_base("tiny", "float32")
    torch.manual_seed(0)
    model = build(base, MethodConfig(method=method, experts=2, prompts_per_expert=3, init="random"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    seen: list[tuple[str, str]] = []
    sizes: list[int] = []
    real = answers.answer

    def spied(model: Any, tokenizer: Any, examples: Sequence[Example], *args: Any, **inputs: Any) -> list[str]:
        found = real(model, tokenizer, examples, *args, **inputs)
        sizes.append(len(examples))
        seen.extend((example.instruction, text) for example, text in zip(examples, found, strict=True))
        return found

    monkeypatch.setattr(answers, "answer", spied)
    monkeypatch.setattr(answers, "BATCH", 4)
    rows = Task.of(base, tokenizer, [], EXAMPLES, TrainConfig(model="tiny", data="office", out=Path("nowhere"))).test
    found = score(model, tokenizer, EXAMPLES, rows, 8)
    assert max(sizes) > 1 and found["count"] == {"a": 5, "b": 4} and found["max_new_tokens"] == 8
    adapted, frozen = dict(seen[: len(EXAMPLES)]), dict(seen[len(EXAMPLES) :])
    assert adapted == {e.instruction: real(model, tokenizer, [e], 8)[0] for e in EXAMPLES}
    with model.disable_adapter():
        assert frozen == {e.instruction: real(model, tokenizer, [e], 8)[0] for e in EXAMPLES}
    assert adapted != frozen


def test_scores_are_means_over_all_answers_and_over_each_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tokenizer = load_base("tiny", "float32")
    model = build(base, MethodConfig(experts=2, prompts_per_expert=3))
    given = {0: "a thing", 1: "A thing.", 2: "no", 3: "a"}
    monkeypatch.setattr(answers, "answer", lambda model, tokenizer, chosen, *_, **__: [given.get(EXAMPLES.index(e), "")
                                                                                      for e in chosen])  # fmt: skip
    rows = Task.of(base, tokenizer, [], EXAMPLES, TrainConfig(model="tiny", data="office", out=Path("nowhere"))).test
    found = score(model, tokenizer, EXAMPLES, rows, 8)
    assert found["exact_match"]["per_task"] == {"a": pytest.approx(1 / 5), "b": pytest.approx(1 / 4)}
    assert found["exact_match"]["overall"] == pytest.approx(2 / 9)
    assert found["rouge_l"]["per_task"]["b"] == pytest.approx((1 + 2 / 3) / 4)


def test_questions_are_the_first_of_each_task_that_fit() -> None:
    base, tokenizer = load_base("tiny", "float32")
    long = Example("very " * 2000, "", "A thing.", "a")
    assert questions(base, tokenizer, [long, *EXAMPLES], 2, 8) == [1, 3, 2, 4]
    with pytest.raises(ValueError, match="none of 9 instructions fits into the 0 positions that 1024 new tokens leave"):
        questions(base, tokenizer, EXAMPLES, 2, 1024)
    for per_task, tokens in ((-1, 8), (2, 0)):
        with pytest.raises(ValueError, match="to answer: choose 1 or more"):
            questions(base, tokenizer, EXAMPLES, per_task, tokens)


@pytest.mark.parametrize(
    "method", ["mops", "embedder", "input-prompt-tuning", "lora", "ia3", "oracle", "nearest-cluster"]
)
def test_a_run_holds_scores_and_evaluate_repeats_them(config: Make, base_folder: Path, method: str) -> None:
    how = {"embedder": str(base_folder)} if method == "embedder" else {"method": method}
    chosen = config(answers_per_task=2, answer_tokens=6, **how)
    metrics = train(chosen)
    found = metrics["answers"]
    assert found["count"] == {"a": 2, "b": 2} and found["max_new_tokens"] == 6
    for side in (found, found["frozen"]):
        for key in ("exact_match", "rouge_l"):
            assert set(side[key]["per_task"]) == {"a", "b"} and 0 <= side[key]["overall"] <= 1
    run = Run.open(chosen.out)
    assert run.read_metrics() == metrics
    if method not in ("oracle", "nearest-cluster"):
        again = cli.evaluate_command(cli.EvaluateConfig(chosen.out, answers=2, answer_tokens=6))
        assert again["answers"] == found
        assert again["perplexity"]["overall"] == pytest.approx(metrics["perplexity"]["overall"], rel=1e-5)


@pytest.mark.slow
def test_who_has_learned_the_tasks_answers_better(tmp_path: Path) -> None:
    found = train(TrainConfig(model="tiny", dtype="float32", data="office", limit=300, out=tmp_path / "run", steps=15, batch_size=8,
                              prompt_lr=3.0, answers_per_task=2, samples_per_task=0, recovery_prompts=0,
                              **EMBEDDED_SETTING))["answers"]  # fmt: skip
    frozen = found["frozen"]
    assert found["rouge_l"]["overall"] > frozen["rouge_l"]["overall"] + 0.1
    assert found["exact_match"]["per_task"]["open_qa"] > frozen["exact_match"]["per_task"]["open_qa"] == 0


def test_no_answers_are_asked_for_by_default_and_impossible_ones_are_refused_before_training(
    config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "answers" not in train(config(steps=1))
    monkeypatch.setattr(steps, "fit", lambda *_, **__: pytest.fail("trained first"))
    with pytest.raises(ValueError, match="256 new tokens leave"):
        train(config(out=config().out / "other", answers_per_task=1, answer_tokens=256))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_and_resumed_run_measures_the_same(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    asked = {"answers_per_task": 2, "answer_tokens": 6, "interference_examples": 3, "seed": seed, "steps": 6}
    whole = train(config(out=tmp_path / "whole", **asked))

    def kill(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "score", kill)
        with pytest.raises(KeyboardInterrupt):
            train(config(out=tmp_path / "killed", **asked))
    again = train(config(out=tmp_path / "killed", resume=True, **asked))
    assert again | {"seconds": 0} == whole | {"seconds": 0}
