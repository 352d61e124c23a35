"""An added expert answers its own task, and every other answer is the same, bit for bit."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file

import smartmops as sm
from smartmops.methods.baselines import load_run as opened
from smartmops.rows.stored import Stored
from smartmops.runs.folder import Run
from smartmops.serving.answering import Answerer, Settings
from smartmops.surgery import told
from smartmops.surgery.subject import Subject
from smartmops.tokens.batches import prompts
from smartmops.tokens.template import Template

OLD = ("apple apple number 3.", "banana banana number 50.", "cherry cherry number 7.", "Something else entirely?")
NEW = "date date number 40."
GAINED = {"before": 9.0, "after": 4.0, "alone": 4.0, "frozen": 8.0, "rows": 3}
Added = tuple[Path, dict[str, Any]]


def said_of(found: dict[str, Any]) -> str:
    """What a terminal shows of an expert that was added."""
    console = Console(record=True, width=200, file=io.StringIO())
    told._added(found, console)
    return console.export_text()


def logits(run: sm.LoadedRun, text: str) -> torch.Tensor:
    """Of the first greedy tokens of an answer."""
    batch = prompts([sm.Example(text, "", "")], run.tokenizer, 96, Template.of("plain", run.tokenizer))
    out = run.model.generate(**batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True,
                             output_logits=True, pad_token_id=0)  # fmt: skip
    return torch.cat(out.logits)


@pytest.fixture(scope="module")
def before(run: Path) -> sm.LoadedRun:
    return sm.load_run(run)


@pytest.fixture(scope="module")
def after(added: Added) -> sm.LoadedRun:
    return sm.load_run(added[0])


@pytest.mark.parametrize("text", OLD)
def test_what_is_not_sent_to_it_is_answered_bit_for_bit_as_before(
    text: str, before: sm.LoadedRun, after: sm.LoadedRun
) -> None:
    assert torch.equal(logits(before, text), logits(after, text))
    was, now = before.latest(), after.latest()
    assert now[0] == was[0] | {"date": 0.0} and now[1] == was[1]


def test_an_expert_that_is_named_answers_as_before(before: sm.LoadedRun, after: sm.LoadedRun) -> None:
    for run in (before, after):
        run.generate(OLD[0], expert="banana", max_new_tokens=1)
        assert run.latest()[0]["banana"] == 1.0
    answers = [run.generate(OLD[0], expert="banana", max_new_tokens=4) for run in (before, after)]
    assert answers[0] == answers[1]


def test_its_own_task_is_sent_to_it_and_gains(added: Added, before: sm.LoadedRun, after: sm.LoadedRun) -> None:
    assert after.experts == ["apple", "banana", "cherry", "date"]
    assert after.gate(NEW)["date"] == 1.0 and sum(after.gate(NEW).values()) == 1.0
    assert not torch.equal(logits(before, NEW), logits(after, NEW))
    found = added[1]
    assert found["new"]["after"] < 0.9 * min(found["new"]["frozen"], found["new"]["before"])
    assert found["new"]["after"] == pytest.approx(found["new"]["alone"], rel=1e-5)
    assert found["rule"]["sent"] > 0.8 and found["rule"]["taken"] == 0
    assert found["old"]["untouched"] == 1.0 and found["old"]["after"] == pytest.approx(found["old"]["before"], rel=1e-6)


def test_the_others_tensors_are_untouched(
    added: Added, run: Path, adapter_of: Callable[[Path], dict[str, Any]]
) -> None:
    was, now = adapter_of(run), adapter_of(added[0])
    assert all(torch.equal(now[name][: len(value)], value) for name, value in was.items())
    grown = {name for name, value in was.items() if value.shape != now[name].shape}
    assert grown == {"mops_keys", "mops_values"}
    assert now.keys() - was.keys() == {f"mops_claim_{name}" for name in ("basis", "centre", "direction", "cut")}


def test_the_run_is_one_like_any_other(added: Added, folder: Path) -> None:
    path = added[0]
    found = sm.evaluate(run=path)["perplexity"]["overall"]
    assert found == pytest.approx(added[1]["old"]["after"], rel=1e-5)
    new = sm.evaluate(run=path, data=str(folder / "new.jsonl"))["perplexity"]["overall"]
    assert new < sm.evaluate(run=folder / "run", data=str(folder / "new.jsonl"))["perplexity"]["overall"]
    base = opened(path)[0].unload()
    loaded = PeftModel.from_pretrained(base, path / "adapter").eval()
    assert loaded.peft_config["default"].named_experts[-1] == "date"
    answerer = Answerer.open(path)
    asked = [answerer.ask(sm.Example(text, "", ""), Settings(max_new_tokens=2)) for text in (NEW, OLD[0])]
    answers = answerer.answer(asked)
    assert answers[0].weights["date"] == 1.0 and answers[1].weights["date"] == 0.0


def similar(folder: Path) -> str:
    """Examples of a fifth task, whose instructions are nearly those of the fourth."""
    rows = [{"instruction": f"date date numeral {i}.", "response": "NOON", "category": "day"} for i in range(24)]
    (folder / "similar.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "similar.jsonl")


def test_a_second_expert_leaves_the_first_one_its_instructions(added: Added, tmp_path: Path) -> None:
    found = sm.add_expert(added[0], data=similar(tmp_path), out=tmp_path / "two", steps=2)
    assert found["old"]["added"]["date"] >= 0.95 and found["old"]["unchecked"] == []
    loaded = sm.load_run(tmp_path / "two")
    texts = [f"date date number {i}." for i in range(24)]
    assert sum(loaded.gate(text)["date"] == 1.0 for text in texts) >= 22
    gates = json.loads((tmp_path / "two" / "gates.json").read_text())
    assert gates["experts"] == loaded.experts and set(gates["after"]) == {"apple", "banana", "cherry"}
    card = (tmp_path / "two" / "adapter" / "README.md").read_text()
    assert "experts add date from new.jsonl" in card and "experts add day from similar.jsonl" in card


def test_what_cannot_be_checked_is_told(added: Added, tmp_path: Path) -> None:
    shutil.copytree(added[0], tmp_path / "own")
    (tmp_path / "own" / "added.safetensors").unlink()  # as of an expert that came before this was kept
    found = sm.add_expert(tmp_path / "own", data=similar(tmp_path), out=tmp_path / "two", steps=2)
    assert found["old"]["unchecked"] == ["date"] and found["old"]["added"] == {}


def test_rows_of_a_run_that_were_mapped_are_mapped_again(run: Path, tmp_path: Path) -> None:
    copy, rows = shutil.copytree(run, tmp_path / "copy"), tmp_path / "rows"
    config = json.loads((copy / "config.json").read_text())
    config["arguments"]["rows"] = str(rows)
    (copy / "config.json").write_text(json.dumps(config))
    assert isinstance(Subject.open(copy, None, (), 9).known().train, Stored) and rows.is_dir()
    rows.rmdir()
    rows.write_text("")  # where no folder can be, they are read into memory
    assert not isinstance(Subject.open(copy, None, (), 9).known().train, Stored)


def test_an_added_expert_is_not_merged_on_data_that_know_nothing_of_it(added: Added, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no training instruction goes to date: give instructions that both serve"):
        sm.merge_experts(added[0], first="date", second="apple", out=tmp_path / "one", steps=2)
    sm.merge_experts(added[0], first="date", second="apple", out=tmp_path / "one", steps=0)
    assert set(load_file(tmp_path / "one" / "added.safetensors")) == {"date+apple"}


def test_a_changed_run_is_not_resumed(added: Added) -> None:
    with pytest.raises(ValueError, match="finished and then changed by `experts add date from new"):
        Run.create(added[0], json.loads((added[0] / "config.json").read_text()), resume=True)


def test_dropped_again_the_run_is_what_it_was(
    added: Added, run: Path, tmp_path: Path, adapter_of: Callable[[Path], dict[str, Any]]
) -> None:
    found = sm.drop_expert(added[0], name="date", out=tmp_path / "back")
    assert found["goes_to"] == {} and found["perplexity"]["tasks"] == {}
    was, now = adapter_of(run), adapter_of(tmp_path / "back")
    assert was.keys() == now.keys() and all(torch.equal(now[name], value) for name, value in was.items())


def test_an_expert_moves_between_runs(added: Added, run: Path, tmp_path: Path, folder: Path) -> None:
    found = sm.add_expert(run, source=f"{added[0]}:date", data=str(folder / "new.jsonl"), out=tmp_path / "moved")
    assert found["new"]["after"] == pytest.approx(added[1]["new"]["after"], rel=1e-3)
    renamed = sm.add_expert(added[0], source=f"{run}:cherry", name="cherry two", out=tmp_path / "again")
    assert renamed["old"]["untouched"] == 1.0
    with pytest.raises(ValueError, match="'fig' is no expert of"):
        sm.add_expert(run, source=f"{added[0]}:fig", out=tmp_path / "none")


def test_a_prompt_becomes_an_expert_that_answers_by_name(run: Path, tmp_path: Path) -> None:
    (tmp_path / "terse.txt").write_text("Answer in as few words as you can, and always in capital letters.")
    found = sm.add_expert(run, prompt=str(tmp_path / "terse.txt"), out=tmp_path / "told", steps=40, relative_lr=0.1,
                          answer_tokens=6, questions=30)  # fmt: skip
    assert found["rule"] is None and found["tokens_saved"] > 10
    assert found["agreement"]["nats"] < found["agreement_without"]["nats"]
    assert "Nothing was gained" not in said_of(found)
    now = sm.load_run(tmp_path / "told")
    assert now.experts[-1] == "terse" and now.gate(OLD[0])["terse"] == 0.0
    now.generate(OLD[0], expert="terse", max_new_tokens=2)
    assert now.latest()[0]["terse"] == 1.0


def test_advice_is_a_sentence_first(run: Path, folder: Path) -> None:
    found = sm.advise(run=run, data=str(folder / "new.jsonl"), steps=20, relative_lr=0.3)
    assert found["advice"].startswith("A new expert helps: ") and next(iter(found)) == "advice"
    assert found["perplexity"]["trial"] < min(found["perplexity"]["now"], found["perplexity"]["frozen"])
    served = sm.advise(run=run, data=str(folder / "three.jsonl"), steps=1)
    assert served["advice"].startswith("A new expert would not help: ")


@pytest.mark.parametrize(("options", "said"), [
    ({"data": "no.jsonl"}, "data='no.jsonl': no such file or folder"),
    ({}, "nothing given: give --data"),
    ({"data": "office", "name": "apple"}, "'apple' is an expert of"),
    ({"data": "office", "inputs": "office"}, "are questions for"),
])  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_loaded(
    run: Path, tmp_path: Path, options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smartmops.surgery.subject.load_run", lambda path: pytest.fail("a base was loaded"))
    with pytest.raises(ValueError) as caught:
        sm.add_expert(run, out=tmp_path / "none", **options)
    assert said.replace("--", "") in str(caught.value) and not (tmp_path / "none").exists()


def test_an_expert_of_a_prompt_has_the_base_s_answers_for_a_target_and_not_those_of_its_questions(
    run: Path, tmp_path: Path
) -> None:
    (tmp_path / "terse.txt").write_text("Answer in capital letters.")
    found = []
    for answer in ("Yes.", "A much longer answer, which nobody gave."):
        rows = [
            {"instruction": f"{word} number {i}.", "response": answer} for i in range(6) for word in ("fig", "pear")
        ]
        (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found.append(sm.add_expert(run, prompt=str(tmp_path / "terse.txt"), inputs=str(tmp_path / "asked.jsonl"),
                                   out=tmp_path / answer[:3], steps=2, answer_tokens=4, by_name=True))  # fmt: skip
    for name in ("agreement", "agreement_without", "tokens_saved", "new"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-6), name


@pytest.mark.parametrize(("changes", "said"), [
    ({}, ""),
    ({"new": GAINED | {"after": 9.0}}, "9.000 → 9.000 on new examples, the frozen base 8.000."),
    ({"new": GAINED | {"after": 9.0}, "rule": None}, ""),
    ({"new": GAINED | {"alone": 8.5}, "rule": None}, "9.000 → 8.500 on new examples, the frozen base 8.000."),
    ({"new": GAINED | {"after": 9.0, "alone": 9.0}, "rule": None, "nats": (0.1, 0.4)}, ""),
    ({"new": GAINED, "nats": (0.5, 0.4)}, "0.500 nats from the base under the prompt with the expert, 0.400 without it."),
    ({"new": {}}, ""),
])  # fmt: skip
def test_a_gain_is_told_by_what_the_expert_was_to_learn(changes: dict[str, Any], said: str) -> None:
    nats = changes.pop("nats", None)
    found: dict[str, Any] = {
        "name": "date", "old": {"before": 3.0, "after": 3.0, "untouched": 1.0, "added": {}, "unchecked": []}, "new": GAINED,
        "rule": {"sent": 0.9, "taken": 0.0},
    } | changes  # fmt: skip
    if nats is not None:
        after, before = ({"greedy": 0.5, "nats": value} for value in nats)
        found |= {"agreement": after, "agreement_without": before, "questions": {"held out": 1}, "tokens_saved": 9}
    text = said_of(found)
    assert f"Nothing was gained: {said}" in text if said else "Nothing was gained" not in text
