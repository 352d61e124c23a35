"""Tasks of EleutherAI's harness: scored as perplexity scores the same answers, base and run side by side, offline."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import smartmops as sm
from smartmops import cli
from smartmops.analysis.finished import LoadedRun
from smartmops.checks.errors import DataError, MissingExtra
from smartmops.evaluation import harness
from smartmops.evaluation.perplexity import _each
from smartmops.flow.trainer import train
from smartmops.options.finished.reading import EvaluateConfig
from smartmops.rows.example import Example
from smartmops.tokens.batches import Collator, encode

Make = Callable[..., Any]
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{target}}}}"
{more}
"""
CHOOSE = "doc_to_choice: ['A', 'B']\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"
SAY = ("fewshot_split: test\nnum_fewshot: 1\ngeneration_kwargs: {until: ['ZZ'], max_gen_toks: 4}\n"
       "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]")  # fmt: skip
QUESTIONS = ("apple 1", "banana 2", "apple 31", "banana 40", "apple 5")


def asked_of(run: LoadedRun) -> harness.Asked:
    return harness.Asked(run.model, run.tokenizer, run._template, 2, run._embedder)


def user(text: str, *before: tuple[str, str]) -> str:
    turns = [{"role": role, "content": content} for role, content in before]
    return json.dumps([*turns, {"role": "user", "content": text}])


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A folder of two tasks, whose data lie beside it."""
    folder, data = tmp_path / "suite", tmp_path / "questions.jsonl"
    folder.mkdir()
    rows = [{"question": text, "target": "ab".index(text[0])} for text in QUESTIONS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choose.yaml").write_text(CHOICE.format(name="choose", file=data, kind="multiple_choice", more=CHOOSE))
    (folder / "say.yaml").write_text(CHOICE.format(name="say", file=data, kind="generate_until", more=SAY))
    return folder


@pytest.mark.parametrize("options", [
    {"method": "mops"}, {"method": "mops", "visible_to": "all", "null_expert": False}, {"method": "lora"},
    {"method": "input-prompt-tuning"},
])  # fmt: skip
def test_an_answer_is_scored_as_perplexity_scores_it(config: Make, options: dict[str, Any]) -> None:
    chosen = config(steps=4, prompt_lr=0.1, **options)
    train(chosen)
    run = sm.load_run(chosen.out)
    run.model.eval()
    examples = [Example(text, "", "AAB"[: 1 + number % 3]) for number, text in enumerate(QUESTIONS)]
    asked, rows = asked_of(run), [encode(each, run.tokenizer, 200, run._template) for each in examples]
    for frozen in (False, True):
        with torch.no_grad(), run.model.disable_adapter() if frozen else nullcontext():
            found = asked.scores([(user(each.instruction), f" {each.response}") for each in examples])
            nats = [dict(_each(run.model, [row], Collator(run.tokenizer), 1, None))[row.category] for row in rows]
        for (score, _), each in zip(found, nats, strict=True):
            assert score == pytest.approx(-float(each[:-1].sum()), rel=1e-4, abs=1e-4), "all but the end of the turn"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    rows = [{"instruction": f"{word} {i}", "response": word[0].upper() * 3, "category": word}
            for i in range(16) for word in ("apple", "banana")]  # fmt: skip
    folder = tmp_path_factory.mktemp("harness")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sm.train(model="tiny", data=str(folder / "rows.jsonl"), out=folder / "run", experts=2, prompts_per_expert=4, steps=30,
             batch_size=4, dtype="float32", samples_per_task=0, relative_lr=0.3)  # fmt: skip
    return sm.load_run(folder / "run")


def test_earlier_turns_the_system_and_a_begun_answer_are_part_of_the_question(run: LoadedRun) -> None:
    asked = asked_of(run)
    plain, system, shots, begun = asked.scores([
        (user("apple 3"), "A"), (user("apple 3", ("system", "Be brief.")), "A"),
        (user("apple 3", ("user", "banana 1"), ("assistant", "BBB")), "A"),
        (json.dumps([{"role": "user", "content": "apple 3"}, {"role": "assistant", "content": "A"}]), "A"),
    ])  # fmt: skip
    assert len({plain[0], system[0], shots[0], begun[0]}) == 4
    ((whole, _),) = asked.scores([(user("apple 3"), "AA")])
    assert plain[0] + begun[0] == pytest.approx(whole, abs=1e-3), "only what comes behind the begun answer is scored"
    assert asked.scores([("", "A")])[0][0] < 0


def test_an_answer_ends_at_the_first_of_its_stops(run: LoadedRun) -> None:
    asked = asked_of(run)
    (text,) = asked.answered([(user("apple 3"), {"max_gen_toks": 8})])
    assert text == run.generate("apple 3", max_new_tokens=8)
    assert asked.answered([(user("apple 3"), {"until": ["nothing of the kind", text[1]], "max_gen_toks": 8})]) == [
        text.split(text[1])[0]
    ]
    begun = json.dumps([{"role": "user", "content": "apple"}, {"role": "assistant", "content": "A"}])
    with pytest.raises(DataError, match=r"begins the answer with 'A' .* leave gen_prefix away"):
        asked.answered([(begun, {})])


def test_answers_that_are_given_in_batches_are_those_given_alone(run: LoadedRun) -> None:
    asked = asked_of(run)
    requests = [(user(f"{word} {i}"), {"max_gen_toks": most, "until": until})
                for i, (word, most, until) in enumerate([("apple", 6, []), ("a long banana, and another one,", 6, ["B"]),
                                                         ("banana", 3, []), ("apple", 6, "A"), ("banana", 6, [])])]  # fmt: skip
    together = asked.answered(requests)
    assert together == [asked.answered([each])[0] for each in requests]
    assert len(set(together)) > 1


def test_what_does_not_fit_loses_its_beginning_and_is_counted(run: LoadedRun) -> None:
    asked = asked_of(run)
    most = int(run.model.config.max_position_embeddings)
    (score, _) = asked.scores([(user("apple " * most), "A")])[0]
    assert score < 0 and len(asked.shortened) == 1


def test_a_missing_harness_is_told_with_its_pip_line_before_a_model_is_loaded(
    run: LoadedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.setattr(LoadedRun, "open", lambda path: pytest.fail("a model was loaded"))
    with pytest.raises(MissingExtra, match=r"lm_eval is not installed: pip install 'smartmops\[lm-eval\]'$"):
        sm.evaluate(run=run.path, suite="anything")


@pytest.mark.parametrize(("options", "said"), [
    ({"suite": "x", "data": "office"}, "office is not of suite x, whose tasks bring"),
    ({"suite": "x", "answers": 3}, "3 is not of suite x"),
    ({"suite_limit": 3}, "3 is of tasks, and none are named"),
    ({"suite": " "}, "is blank: give a folder of task files"),
])  # fmt: skip
def test_a_suite_is_measured_by_itself(options: dict[str, Any], said: str, run: LoadedRun) -> None:
    with pytest.raises(ValueError) as error:
        sm.evaluate(run=run.path, **options)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_base_and_run_are_asked_the_same_and_stand_side_by_side(
    run: LoadedRun, suite: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="the harness, extra lm-eval")
    monkeypatch.chdir(suite)  # which git knows nothing of
    before = json.loads((run.path / "metrics.json").read_text())
    found = cli.evaluate_command(EvaluateConfig(run=run.path, suite=str(suite)))["suite"]
    table, said = capfd.readouterr()
    assert "fatal" not in said
    assert found["questions"] == {"choose": 5, "say": 5} and found["shortened"] == 0
    assert found["adapted"]["choose"]["acc"] == 1.0, "the run was trained to say A or B"
    asked = asked_of(run)
    for side, closed in (("frozen", True), ("adapted", False)):
        with run.model.disable_adapter() if closed else nullcontext():
            right = 0
            for text in QUESTIONS:
                one, other = (asked.scores([(user(text), word)])[0][0] for word in "AB")
                right += (other > one) == (text[0] == "b")
        assert found[side]["choose"]["acc"] == pytest.approx(right / 5)
        assert f"{right / 5:.3f}" in table and "exact_match" in found[side]["say"]
    after = json.loads((run.path / "metrics.json").read_text())
    assert after == before | {"suites": {str(suite): found}}
    assert json.loads((run.path / "evaluation.json").read_text()) == {"suite": found}
    few = run.evaluate(suite=str(suite / "choose.yaml"), suite_limit=2)["suite"]
    assert few["questions"] == {"choose": 2}


def test_what_the_harness_cannot_ask_is_refused_before_a_model_is_loaded(
    run: LoadedRun, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="the harness, extra lm-eval")
    monkeypatch.setattr(LoadedRun, "open", lambda path: pytest.fail("a model was loaded"))
    (tmp_path / "empty").mkdir()
    rolling = tmp_path / "rolling.yaml"
    rolling.write_text(CHOICE.format(name="rolling", file=tmp_path / "questions.jsonl", kind="loglikelihood_rolling",
                                     more="metric_list: [{metric: word_perplexity}]"))  # fmt: skip
    broken = tmp_path / "broken.yaml"
    broken.write_text(CHOICE.format(name="broken", file=tmp_path / "gone.jsonl", kind="multiple_choice", more=CHOOSE))
    for given, said in (
        (tmp_path / "empty", "holds no task of the harness: give a folder of its YAML files"),
        ("no_such_task", "is no folder or file here and no task of the harness"),
        (rolling, "task rolling measures running text, which answers no instruction"),
        (broken, "cannot be loaded (FileNotFoundError: "),
    ):
        with pytest.raises(DataError) as error:
            sm.evaluate(run=run.path, suite=str(given))
        assert said in str(error.value) and "\n" not in str(error.value)
