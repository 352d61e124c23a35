"""A finished run in memory: what it answers, which experts fire, what it measures and saves."""

from __future__ import annotations

import json
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

import smartmops as sm
from smartmops import cli
from smartmops.analysis import finished
from smartmops.analysis.finished import _seen
from smartmops.data.tasks import splits
from smartmops.options.finished.reading import EvaluateConfig
from smartmops.reading.task import Task
from smartmops.rows.stored import Stored

TEXT = "What is the capital of France?"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs") / "office"
    found = sm.train(model="tiny", data="office", limit=140, steps=4, batch_size=4, dtype="float32",
                     samples_per_task=0, out=out)  # fmt: skip
    return out, found


@pytest.fixture(scope="module")
def run(trained: tuple[Path, dict[str, Any]]) -> sm.LoadedRun:
    return sm.load_run(str(trained[0]))


def test_it_measures_what_training_measured(trained: tuple[Path, dict[str, Any]], run: sm.LoadedRun) -> None:
    assert run.evaluate()["perplexity"]["overall"] == pytest.approx(trained[1]["perplexity"]["overall"], rel=1e-5)
    with pytest.raises(ValueError, match=r"^batch_size=0: choose 1 or more$"):
        run.evaluate(batch_size=0)
    with pytest.raises(sm.ConfigError, match="'foo' is no option of evaluate: choose from columns, max_length"):
        run.evaluate(foo=1)


def test_it_says_what_it_measures(run: sm.LoadedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.evaluate()
    said = capsys.readouterr().out
    assert "test: 14 examples" in said and "train: " not in said
    rows = [{"instruction": f"Say {number}.", "response": "Yes.", "category": "qa"} for number in range(20)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.evaluate(str(tmp_path / "own.jsonl"))
    assert "measured: 20 examples" in (said := capsys.readouterr().out) and "test: " not in said
    assert json.loads((run.path / "evaluation.json").read_text())["examples"] == 20


@pytest.mark.parametrize(("part", "trained_on"), [("train", 12), ("test", 0), ("both", 9), ("none", 0)])
def test_it_says_how_much_of_other_data_it_was_trained_on(
    run: sm.LoadedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, trained_on: int
) -> None:
    train, test = splits("office", 140)
    other = [sm.Example("Say it.", "", "It.")]
    given = {"train": train[:12], "test": test[:12], "both": [*train[:9], *test[:3]], "none": other}[part]
    rows = [{"instruction": each.instruction, "context": each.context, "response": each.response, "task": "mine"}
            for each in given]  # fmt: skip
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    run.evaluate(str(tmp_path / "own.jsonl"))
    said = " ".join(capsys.readouterr().out.split())
    wanted = f"{trained_on} of {len(given)} examples are of the data that {run.path} was trained on"
    assert (wanted in said) == bool(trained_on) and ("trained on" in said) == bool(trained_on)


def test_where_its_own_data_have_gone_it_says_that_it_cannot_tell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": f"Say {number}.", "response": "Yes.", "category": "qa"} for number in range(40)]
    own, other = tmp_path / "own.jsonl", tmp_path / "other.jsonl"
    for file in (own, other):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sm.train(model="tiny", data=str(own), steps=0, batch_size=4, experts=1, dtype="float32", samples_per_task=0,
             out=tmp_path / "run")  # fmt: skip
    for change in (lambda: own.write_text(own.read_text().replace("Yes.", "No.")), own.unlink):
        change()
        capsys.readouterr()
        sm.evaluate(run=tmp_path / "run", data=str(other))
        said = " ".join(capsys.readouterr().out.split())
        assert f"whether {tmp_path / 'run'} was trained on some of these examples cannot be told (" in said
    with pytest.raises(
        sm.DataError, match=r"own\.jsonl, on which .*run was measured, is not there: give data, or call"
    ):
        sm.evaluate(run=tmp_path / "run")


@pytest.mark.parametrize("data", ["dolly", "owner/name", ("office", "gone.jsonl")])
def test_the_hub_is_not_asked_for_data_that_nobody_named(
    run: sm.LoadedRun, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smartmops.data.tasks._load", None)
    monkeypatch.setitem(run._run.config["arguments"], "data", data)
    (said,) = _seen(run._run, [sm.Example("Say it.", "", "It.")])
    gone = data if isinstance(data, str) else data[-1]
    assert said.endswith(f"cannot be told (its data, {gone}, are no file or folder here)")


def test_data_of_a_run_that_were_mapped_are_mapped_again(
    run: sm.LoadedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smartmops.data.tasks.read", None)
    monkeypatch.setitem(run._run.config["arguments"], "rows", str(tmp_path / "rows"))
    train, test = splits("office", 140, folder=tmp_path / "own")
    (said,) = _seen(run._run, [*train[:3], train[0], *test[:2]])
    assert said.startswith("4 of 6 examples are of the data") and (tmp_path / "rows").is_dir()


@pytest.mark.parametrize("other", [False, True])
def test_rows_that_were_mapped_are_mapped_when_they_are_measured(
    run: sm.LoadedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: bool
) -> None:
    rows = [{"instruction": f"Say {number}.", "response": "Yes.", "category": "qa"} for number in range(20)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(tmp_path / "own.jsonl") if other else None
    in_memory = run.evaluate(data)["perplexity"]
    tasks: list[Task] = []
    again = run._task
    monkeypatch.setattr(run, "_task", lambda *given: tasks.append(again(*given)) or tasks[-1])
    monkeypatch.setattr("smartmops.data.tasks.read", None)
    monkeypatch.setattr("smartmops.analysis.finished.read", None)
    monkeypatch.setitem(run._run.config["arguments"], "rows", str(tmp_path / "rows"))
    assert run.evaluate(data)["perplexity"] == in_memory and (tmp_path / "rows").is_dir()
    assert run.evaluate(data, rows=str(tmp_path / "elsewhere"))["perplexity"] == in_memory
    assert (tmp_path / "elsewhere").is_dir()
    for task in tasks:
        assert isinstance(task.test, Stored) and isinstance(task.test_examples, Stored)


def test_where_rows_cannot_be_mapped_another_place_is_asked_for(
    run: sm.LoadedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setitem(run._run.config["arguments"], "rows", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"rows='.*file' cannot be written to .* choose another folder, .*'memory'"):
        run.evaluate()
    assert run.evaluate(rows="memory")["perplexity"]


def test_a_run_that_cannot_be_written_is_measured_and_says_so(
    run: sm.LoadedRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (run.path / "evaluation.json").unlink(missing_ok=True)
    monkeypatch.setattr("smartmops.runs.folder.open", _read_only, raising=False)
    found = cli.evaluate_command(EvaluateConfig(run=run.path))
    assert found["perplexity"] and "overall" in capsys.readouterr().out
    file = run.path / "evaluation.json"
    said = f"{file} cannot be written (Read-only file system): the numbers are told here alone"
    assert said in caplog.messages and not file.exists()


def _read_only(path: Path, *_: Any, **__: Any) -> Any:
    raise OSError(30, "Read-only file system", str(path))


@pytest.mark.parametrize(("line", "said"), [
    ("report RUN", "RUN/report.html cannot be written: name another file with --out"),
    ("experts RUN drop ONE --in-place", "--in-place: RUN cannot be written: write what changed elsewhere, with --out DIR"),
    ("experts RUN add --name new --data DATA --in-place", "--in-place: RUN cannot be written"),
])  # fmt: skip
def test_a_place_that_cannot_be_written_is_told_before_anything_is_read(
    line: str, said: str, run: sm.LoadedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("never read")
    known = {"RUN": str(run.path), "ONE": run.experts[0], "DATA": str(tmp_path / "rows.jsonl")}
    monkeypatch.setattr("os.access", lambda *_: False)
    monkeypatch.setattr("sys.argv", ["smartmops", *(known.get(word, word) for word in line.split())])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err.startswith(f"error: {said.replace('RUN', str(run.path))}")


def test_a_run_tested_on_validation_data_is_measured_on_them_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = sm.train(model="tiny", data="office", limit=140, steps=1, batch_size=4, dtype="float32", validation=True,
                     samples_per_task=0, out=tmp_path / "run")  # fmt: skip
    capsys.readouterr()
    again = sm.evaluate(run=tmp_path / "run")["perplexity"]
    assert again["overall"] == pytest.approx(found["perplexity"]["overall"], rel=1e-5)
    assert f"validation: {found['examples']['test']} examples" in (said := capsys.readouterr().out)
    assert "test: " not in said
    words = "the part of the training split that --validation tests on"
    assert found["measured_on"] == words and f"tokens of {words}:" in (tmp_path / "run/adapter/README.md").read_text()
    for rows, count in ((200, ""), (2, f"2 of the {found['examples']['test']} examples of ")):
        sm.drop_expert(tmp_path / "run", name="open_qa", rows=rows, out=tmp_path / f"less-{rows}")
        assert f"tokens of {count}{words}:" in (tmp_path / f"less-{rows}/adapter/README.md").read_text()
    listed = sm.list_experts(tmp_path / "run")
    assert listed["part"] == ("validation" if found["examples"].get("validation") else "test")


def test_it_answers_and_weighs_as_inspect_does(trained: tuple[Path, dict[str, Any]], run: sm.LoadedRun) -> None:
    seen = sm.inspect(run=trained[0], text=TEXT, max_new_tokens=6)
    assert run.generate(TEXT, max_new_tokens=6) == seen["adapted"]
    assert run.gate(TEXT) == pytest.approx(seen["gate"], abs=1e-6) and list(run.gate(TEXT)) == run.experts


def test_the_lines_of_its_card_answer_as_it_does(run: sm.LoadedRun, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run.path / "adapter"
    (lines,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert "gate_mask=torch.tensor([asked.gate_mask])" in lines, "no token ids say what the user wrote in a plain frame"
    found: dict[str, Any] = {}
    exec(lines.replace("THIS FOLDER", str(folder)).replace("Your question", TEXT), found)
    answer = run.generate(TEXT)
    assert answer in capsys.readouterr().out
    torch.testing.assert_close(found["model"].base_model.last_gate.float(), run.model.base_model.last_gate.float(),
                               rtol=0, atol=1e-2)  # fmt: skip
    said = found["asked"].input_ids
    with pytest.warns(
        UserWarning, match="taught what users wrote alone, and nothing says where that stands: give gate_"
    ):
        found["model"].generate(inputs=torch.tensor([said]), max_new_tokens=1)


def test_one_expert_answers_alone_when_it_is_named(run: sm.LoadedRun) -> None:
    before = run.gate(TEXT)
    run.generate(TEXT, expert=run.experts[2], max_new_tokens=2)
    alone = run.latest()[0]
    assert alone[run.experts[2]] == pytest.approx(1) and sum(alone.values()) == pytest.approx(1)
    assert run.gate(TEXT) == before
    with pytest.raises(ValueError, match=r"'cook' is no expert of this run: choose one of "):
        run.generate(TEXT, expert="cook")


def test_a_text_that_leaves_no_position_is_refused_and_none_loses_its_end(
    run: sm.LoadedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ask in (run.generate, run.gate):
        with pytest.raises(
            sm.DataError, match=r"the prompt takes 2\d{3} tokens, and of the model's \d+ positions none"
        ):
            ask("Repeat the last word.", "a " * 2000)
    seen: list[int] = []
    monkeypatch.setattr(finished, "answer", lambda model, tokenizer, examples, most, *_, **__: [str(seen.append(most))])
    run.generate("Repeat it.", "a " * 900, max_new_tokens=800)
    asked = len(sm.render(run.tokenizer, "Repeat it.\n\n" + ("a " * 900).strip()).input_ids)
    positions = run.model.config.max_position_embeddings
    assert seen == [positions - asked] and asked + 800 > positions  # up to the last position, and nothing is cut


def test_a_method_that_is_told_asks_for_an_expert(tmp_path: Path) -> None:
    sm.train(model="tiny", data="office", limit=140, steps=1, batch_size=4, method="oracle", samples_per_task=0,
             out=tmp_path / "told")  # fmt: skip
    told = sm.load_run(tmp_path / "told")
    for ask in (told.generate, told.gate):
        with pytest.raises(sm.RunError, match=r"method 'oracle', which is told which expert to use"):
            ask(TEXT)
    assert isinstance(told.generate(TEXT, expert=told.experts[0], max_new_tokens=4), str)
    with pytest.raises(sm.RunError, match="which is told which expert to use: inspect a run of method mops"):
        sm.inspect(run=tmp_path / "told", text=TEXT)


def test_a_chat_of_one_turn_is_an_instruction(run: sm.LoadedRun) -> None:
    said = [{"role": "user", "content": TEXT}]
    assert run.chat(said, max_new_tokens=6) == run.generate(TEXT, max_new_tokens=6)
    answered = [*said, {"role": "assistant", "content": "Paris."}]
    run.chat([*answered, {"role": "user", "content": "And of Spain?"}], max_new_tokens=2)
    with pytest.raises(ValueError, match="ends with the assistant: add what the user says next"):
        run.chat(answered)


def test_what_it_saves_is_loaded_by_peft(tmp_path: Path, run: sm.LoadedRun) -> None:
    run.save(tmp_path / "own")
    base, _ = sm.load_base("tiny", "float32")
    again = PeftModel.from_pretrained(base, tmp_path / "own").eval()
    assert again.peft_config["default"].expert_names == run.experts
    assert (tmp_path / "own" / "tokenizer.json").is_file()
    for file in (run.path / "adapter").iterdir():
        assert (tmp_path / "own" / file.name).read_bytes() == file.read_bytes(), file.name
    assert [file.name for file in tmp_path.iterdir()] == ["own"]


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_what_it_saves_answers_as_the_run_whatever_template_the_base_has(tmp_path: Path, template: str) -> None:
    model, tokenizer = sm.load_base("tiny", "float32")
    tokenizer.chat_template = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
                               "{% if add_generation_prompt %}<assistant>{% endif %}")  # fmt: skip
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "base")
    sm.train(model=str(tmp_path / "base"), data="office", limit=140, steps=1, batch_size=4, dtype="float32",
             template=template, samples_per_task=0, out=tmp_path / "run")  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        run = sm.load_run(tmp_path / "run")
        run.save(tmp_path / "own")
    own = AutoTokenizer.from_pretrained(tmp_path / "own")
    said = sm.render(own, TEXT)
    assert said == sm.render(tokenizer, TEXT, template=template) == sm.render(run.tokenizer, TEXT)
    again = PeftModel.from_pretrained(sm.load_base(str(tmp_path / "base"), "float32")[0], tmp_path / "own").eval()
    ids = again.generate(inputs=torch.tensor([said.input_ids]), gate_mask=torch.tensor([said.gate_mask]),
                         max_new_tokens=8, do_sample=False, pad_token_id=0)[0, len(said.input_ids) :]  # fmt: skip
    assert own.decode(ids, skip_special_tokens=True).strip() == run.generate(TEXT, max_new_tokens=8)


def test_it_saves_over_nothing(tmp_path: Path, run: sm.LoadedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for folder, held in ((tmp_path / "mine", "notes.txt"), (run.path, "adapter"), (run.path / "adapter", "README.md")):
        before = sorted(folder.iterdir())
        with pytest.raises(sm.RunError, match=rf"^folder {folder} holds {held}: choose another folder$"):
            run.save(folder)
        assert sorted(folder.iterdir()) == before
    with pytest.raises(OSError, match=r"notes\.txt is a file: choose a folder"):
        run.save(tmp_path / "mine" / "notes.txt")
    monkeypatch.setattr(run.model, "save_pretrained", _full)
    with pytest.raises(OSError, match="No space left"):
        run.save(tmp_path / "full")
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def _full(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    raise OSError(28, "No space left on device")


def test_each_thread_gets_the_gate_of_its_own_text(run: sm.LoadedRun) -> None:
    texts = [f"{words} {number}" for number in range(4) for words in ("Summarize:", "Name three", "Is it so?")]
    want = [run.gate(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run.gate, texts)) == want


def test_what_cannot_be_asked_is_told(trained: tuple[Path, dict[str, Any]], run: sm.LoadedRun) -> None:
    with pytest.raises(sm.ConfigError, match=r"max_new_tokens=5000, but this model has \d+ positions: choose fewer"):
        run.generate("hello", max_new_tokens=5000)
    with pytest.raises(sm.RunError, match="has answered nothing yet: ask it first"):
        sm.load_run(trained[0]).latest()
