"""What a run exports is loaded by others, without this package, and answers as the run does."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import smartmops as sm
from smartmops.handover import columns as columns_of
from smartmops.handover import export as exporting
from smartmops.handover import pages
from smartmops.handover.pages import kv_page, peft_page
from smartmops.tokens.template import Template

QUESTIONS = ("apple number 3.", "banana number 40.", "Name three rivers.")
FORMS = {"peft-prefix": "by_all", "cartridge": "by_all", "kv": "by_all", "kv seen by answers": "by_answers"}
EXPERT = "banana"
# One program for all forms: to import torch and PEFT takes longer than all that it does.
PROGRAM = """
import json, runpy, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, found = sys.argv[1], {}
for folder, expert, rows in json.loads(sys.argv[2]):
    model, answers, logits = AutoModelForCausalLM.from_pretrained(base).eval(), [], []
    if "kv" in folder:
        own, file = runpy.run_path(f"{folder}/answer.py"), f"{folder}/{expert}.safetensors"
        for ids in rows:
            logits.append(own["read"](model, ids, file)[0].tolist())
            answers.append(own["answer"](model, ids, file, 8, set()))
    else:
        model = PeftModel.from_pretrained(model, f"{folder}/{expert}").eval()
        for ids in rows:
            row = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
            with torch.no_grad():
                logits.append(model(**row).logits[0, -1].tolist())
            made = model.generate(**row, max_new_tokens=8, do_sample=False, pad_token_id=0)
            answers.append(made[0, len(ids):].tolist())
    found[folder] = answers, logits
print(json.dumps(found))
"""
ROUTE = """
import json, runpy
router = runpy.run_path(sys.argv[1] + "/route.py")["Router"](sys.argv[1])
print(json.dumps([router(text) for text in json.loads(sys.argv[2])]))
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def told(run: sm.LoadedRun, expert: str) -> tuple[list[list[int]], list[list[int]], list[torch.Tensor]]:
    """Prompts, the run's own pinned answers to them, and the logits of the first token of each."""
    template = Template.of("plain", run.tokenizer)
    rows = [prompt.input_ids for prompt in template.prompts([sm.Example(q, "", "").turns() for q in QUESTIONS])]
    answers, logits = [], []
    for ids in rows:
        made = run.model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=8,
            do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
            gate_weights=torch.tensor([[float(name == expert) for name in run.experts]]),
        )  # fmt: skip
        answers.append(made.sequences[0, len(ids) :].tolist())
        logits.append(made.logits[0][0])
    return rows, answers, logits


@pytest.fixture(scope="module")
def runs(by_all: Path, by_answers: Path) -> dict[str, sm.LoadedRun]:
    return {"by_all": sm.load_run(by_all), "by_answers": sm.load_run(by_answers)}


@pytest.fixture(scope="module")
def exported(runs: dict[str, sm.LoadedRun], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each form."""
    folder = tmp_path_factory.mktemp("exported")
    for form, run in FORMS.items():
        sm.export(run=runs[run].path, format=form.split()[0], out=folder / form, experts=(EXPERT, "cherry"))
    return {form: folder / form for form in FORMS}


@pytest.fixture(scope="module")
def found(
    exported: dict[str, Path], runs: dict[str, sm.LoadedRun], base: Path, elsewhere: Callable[..., Any]
) -> dict[str, Any]:
    """By form, what another program answers with it: tokens, and logits of the first."""
    asked = [(str(exported[form]), EXPERT, told(runs[run], EXPERT)[0]) for form, run in FORMS.items()]
    answers = elsewhere(PROGRAM, str(base), json.dumps(asked))
    return {form: answers[str(exported[form])] for form in FORMS}


@pytest.mark.parametrize("form", FORMS)
def test_other_programs_answer_as_the_pinned_expert(
    form: str, found: dict[str, Any], runs: dict[str, sm.LoadedRun]
) -> None:
    _, answers, logits = told(runs[FORMS[form]], EXPERT)
    assert found[form][0] == answers
    for got, wanted in zip(found[form][1], logits, strict=True):
        assert torch.allclose(torch.tensor(got), wanted, atol=2e-4, rtol=1e-4)


def test_experts_differ_from_each_other_and_from_the_base(runs: dict[str, sm.LoadedRun]) -> None:
    run = runs["by_all"]
    firsts = [told(run, name)[2][0] for name in run.experts]
    with run.model.disable_adapter():
        firsts.append(told(run, "apple")[2][0])
    gaps = [float((one - other).abs().max()) for i, one in enumerate(firsts) for other in firsts[:i]]
    assert min(gaps) > 0.05, "else a test that compares answers compares nothing"


def test_prefixes_hold_a_copy_of_a_column_for_each_expert_and_name_no_folder(
    exported: dict[str, Path], base: Path
) -> None:
    for form in ("peft-prefix", "cartridge"):
        told = json.loads((exported[form] / "export.json").read_text())
        assert told["experts"][EXPERT]["columns"] == 3 * 3 + 2, "three copies of three columns, and the shared two"
        held = load_file(exported[form] / EXPERT / "adapter_model.safetensors")["prompt_embeddings"]
        assert held.shape == (11, 4 * 2 * 2 * 8)
        assert str(base.parent) not in "".join(file.read_text() for file in exported[form].rglob("*.[jm]*"))


@pytest.mark.parametrize(("form", "first", "shared"), [("kv", 0, 2), ("kv seen by answers", 1, 0)])
def test_keys_and_values_lie_as_the_page_says(form: str, first: int, shared: int, exported: dict[str, Path]) -> None:
    tensors = load_file(exported[form] / "cherry.safetensors")
    assert sorted({int(name.split(".")[1]) for name in tensors}) == list(range(first, 4))
    weights = tensors[f"layers.{first}.log_weights"].exp()
    assert torch.allclose(weights, torch.tensor([3.0] * 3 + [1.0] * shared)), "one of three experts has all weight"
    assert tensors["layers.3.keys"].shape == tensors["layers.3.values"].shape == (3 + shared, 2, 8)


def test_the_router_names_the_experts_that_the_gate_chooses(
    by_answers: Path, runs: dict[str, sm.LoadedRun], tmp_path: Path, elsewhere: Callable[..., Any]
) -> None:
    pytest.importorskip("onnxruntime")
    found = sm.export(run=by_answers, format="router", out=tmp_path / "out")
    assert found["same"] == found["texts"] and found["largest_difference"] < 1e-5
    texts = [*QUESTIONS, "cherry number 7.", "7", "How\nmany  apples?"]
    run = runs["by_answers"]
    routed = elsewhere(ROUTE, str(tmp_path / "out"), json.dumps(texts))
    for text, got in zip(texts, routed, strict=True):
        wanted = run.gate(text)
        assert got["weights"] == pytest.approx(wanted, abs=1e-4), text
        assert got["left_to_base"] == pytest.approx(1 - sum(wanted.values()), abs=1e-4)
        best = max(wanted, key=wanted.__getitem__)
        assert got["expert"] == (best if wanted[best] > 0 else None)
    assert [each["expert"] for each in routed[:2]] == ["apple", "banana"], "and not every text is left to the base"


@pytest.mark.parametrize(("kind", "options", "said"), [
    ("by_answers", {"format": "peft-prefix"}, "seen by every token, and this run's experts by answers alone: choose"),
    ("by_all", {"format": "kv", "experts": ("plum",)}, "plum is no expert of .*: choose apple, banana or cherry"),
])  # fmt: skip
def test_what_cannot_be_carried_is_refused_before_a_model_is_loaded(
    kind: str, options: dict[str, Any], said: str, tmp_path: Path, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(exporting.Answerer, "open", lambda path: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=said):
        sm.export(run=request.getfixturevalue(kind), out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("changes", "form", "said"), [
    ({"injection_layer": 2}, "cartridge", "begin at layer 2"),
    ({"prefix_attention": "separate"}, "kv", "stand outside the softmax over text"),
    ({"num_experts": 1}, "router", "there is nothing to route"),
    ({"null_threshold": 0.0}, "router", "leaves every text to the base"),
])  # fmt: skip
def test_each_reason_is_told_by_the_adapter_s_config(changes: dict[str, Any], form: Any, said: str) -> None:
    from smartmops.options.finished.handover import uncarried

    config = {"visible_to": "all", "injection_layer": 0, "prefix_attention": "joint", "num_experts": 3,
              "null_threshold": 0.5}  # fmt: skip
    assert list(uncarried(form, config)) == []
    (line,) = uncarried(form, config | changes)
    assert said in line


def test_a_folder_that_holds_something_is_left_alone(by_all: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds mine\.txt: choose another folder"):
        sm.export(run=by_all, format="kv", out=tmp_path)


def test_an_export_that_answers_otherwise_is_refused_and_leaves_nothing(
    by_all: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smartmops.handover.prefixes.moved", lambda backbone, layer, keys, by: keys)
    with pytest.raises(ValueError, match="exported answers otherwise than pinned"):
        sm.export(run=by_all, format="peft-prefix", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_goes_with_the_next(by_answers: Path, tmp_path: Path) -> None:
    left = tmp_path / "out" / ".out.1.tmp"
    left.mkdir(parents=True)
    (left / "README.md").touch()
    (tmp_path / "out" / ".lock").write_text("1")
    sm.export(run=by_answers, format="router", out=tmp_path / "out")
    assert not [item for item in tmp_path.rglob("*") if item.name.startswith(".")]


@pytest.mark.parametrize("given", [[], ["--help"], ["base", "file"], ["base", "file", "text", "8", "more"]])
def test_the_exported_program_says_what_it_takes(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(exporting.__file__).with_name("alone") / "answer.py"
    monkeypatch.setattr("sys.argv", [str(script), *given])
    with pytest.raises(SystemExit, match=r"^python answer\.py BASE EXPERT\.safetensors TEXT \[TOKENS\]$"):
        runpy.run_path(str(script), run_name="__main__")


def test_a_missing_package_is_told_before_anything_is_loaded(
    by_answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smartmops.handover.router.NEEDS", ("onnx_that_is_not_there",))
    monkeypatch.setattr(exporting.Answerer, "open", lambda path: pytest.fail("a model was loaded"))
    with pytest.raises(ImportError, match=r"onnx_that_is_not_there is not installed: pip install 'smartmops\[onnx\]'"):
        sm.export(run=by_answers, format="router", out=tmp_path / "out")


def test_columns_with_weights_are_as_many_copies(tmp_path: Path) -> None:
    one = columns_of.Columns(torch.randn(2, 1, 4), torch.randn(2, 1, 4), torch.tensor([3.0, 1.0]).log())
    many = one.repeated()
    query = torch.randn(1, 4)
    text = torch.randn(5, 4), torch.randn(5, 4)

    def attended(columns: columns_of.Columns) -> torch.Tensor:
        logits = query @ torch.cat([columns.keys[:, 0], text[0]]).T + torch.cat([columns.log_weights, torch.zeros(5)])
        return logits.softmax(-1) @ torch.cat([columns.values[:, 0], text[1]])

    assert len(many.keys) == 4 and torch.allclose(attended(one), attended(many), atol=1e-6)
    save_file({"keys": many.keys}, tmp_path / "whole.safetensors")
    with pytest.raises(ValueError, match=r"weight 1\.5000, which no number of copies is"):
        columns_of.Columns(one.keys, one.values, torch.tensor([1.5, 2.0]).log()).repeated()


def test_files_of_experts_have_names_that_every_disk_takes() -> None:
    long = ["a long name " * 40, "A long name " * 40, "длинное имя" * 30, "b_2", "b", "B"]
    found = exporting._file_names(long)
    assert max(len(name.encode()) for name in found.values()) <= 110
    assert len({name.lower() for name in found.values()}) == len(long)


@pytest.mark.parametrize("page", [kv_page, peft_page])
def test_a_base_that_is_ours_alone_is_saved_for_others_by_the_page_s_own_line(
    page: Callable[[dict[str, Any]], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"base": "tiny", "experts": {"a": {"same": 3, "of": 3, "largest_difference": 0.0, "columns": 2}}}
    monkeypatch.setattr(pages, "_table", lambda found: "")
    monkeypatch.setattr(pages, "_first", lambda found: "a")
    (line,) = re.findall("python -c '(.*)'", page(found))
    monkeypatch.chdir(tmp_path)
    exec(line)
    assert AutoModelForCausalLM.from_pretrained("tiny").config.num_hidden_layers == 8
    assert "python -c" not in page(found | {"base": "owner/model"})
