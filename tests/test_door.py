"""What the command line can do, one import can do: the same results, the same checks, names that stay."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

import smartmops as sm
from smartmops import cli, door
from smartmops.options.method import GatePretraining
from smartmops.preparing.adapting import adapt
from smartmops.reading.task import Task

API = Path(__file__).with_name("api.txt")
OPTIONS: dict[str, Any] = {
    "model": "tiny", "data": "office", "limit": 140, "steps": 4, "batch_size": 4, "dtype": "float32",
    "samples_per_task": 0,
}  # fmt: skip


def api() -> Iterator[str]:
    """Each public name with its signature, or as what it is."""
    for name in sm.__all__:
        found = getattr(sm, name)
        if inspect.isfunction(found):
            yield f"{name}{inspect.signature(found)}"
        else:
            yield f"{name}: {'class' if inspect.isclass(found) else type(found).__name__}"


def test_public_names_and_signatures_are_those_that_were_promised() -> None:
    found = "\n".join(api()) + "\n"
    assert found == API.read_text(), f"a promise to users changes; if that is meant, write this to {API}:\n{found}"


def test_every_name_is_there_and_no_other() -> None:
    assert set(sm.__all__) <= set(dir(sm))
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        sm.trian  # noqa: B018


def test_to_import_it_brings_no_torch() -> None:
    program = "import sys, smartmops; smartmops.TrainConfig; print([n for n in ('torch', 'peft') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_python_trains_what_the_command_line_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items() if name != "model"]
    monkeypatch.setattr(sys, "argv", ["smartmops", "train", "tiny", *words, "--out", str(tmp_path / "shell")])
    cli.main()
    found = sm.train(**OPTIONS, out=str(tmp_path / "python"))
    runs = [tmp_path / name for name in ("shell", "python")]
    one, other = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    told = [json.loads((run / "metrics.json").read_text()) for run in runs]
    assert told[0]["perplexity"] == told[1]["perplexity"] == found["perplexity"]
    assert sm.evaluate(run=runs[1])["perplexity"]["overall"] == pytest.approx(found["perplexity"]["overall"], rel=1e-5)
    seen = sm.inspect(run=str(runs[1]), text="What is the capital of France?", max_new_tokens=2)
    assert sum(seen["gate"].values()) + seen["left_to_base"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("options", "said"), [
    ({"batch_size": 0}, r"^batch_size=0: choose 1 or more$"),
    ({"prompt_lr": -1.0}, r"^prompt_lr=-1\.0: choose"),
    ({"experts": 2}, "^experts=2, but there are 7 tasks: choose 7, or gate_pretraining clusters"),
    ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
])  # fmt: skip
def test_wrong_options_are_told_by_their_names_in_python(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        sm.train(**OPTIONS | options, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unknown_options_name_the_nearest_known_one(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="'step' is no option of TrainConfig: 'steps' is meant, perhaps"):
        sm.train(**OPTIONS, step=3, out=tmp_path)
    with pytest.raises(TypeError, match="a config and steps: give one or the other"):
        sm.train(sm.TrainConfig(**OPTIONS, out=tmp_path), steps=3)


def test_every_command_that_returns_results_has_its_function() -> None:
    names = {"data": "preview", "experts": "list_experts"}
    other = {"quickstart", "federate-keys", "federate-server", "federate-client", "report", "reproduce", "bench",
             "serve"}  # fmt: skip
    there = {*dir(door), *dir(sm.LoadedRun)}
    missing = [name for name in cli.COMMANDS if name not in other and names.get(name, name) not in there]
    assert not missing, f"{missing} can be done on the command line alone"


@pytest.mark.parametrize("kind", ["keys_values", "hidden_states"])
def test_an_adapter_of_ones_own_is_prepared_as_train_prepares_its_own(kind: str) -> None:
    examples = sm.read("office")[::14]
    base, tokenizer = sm.load_base("tiny", "float32")
    own: dict[str, Any] = {"gate_bias": True, "null_expert": True} if kind == "keys_values" else {}
    visible = "answers" if kind == "keys_values" else "all"
    config = sm.TrainConfig(model="tiny", data="office", out=Path("unused"), experts=7, expert_kind=kind, recovery_prompts=0,
                            validation_share=0.0)  # fmt: skip
    task = Task.of(base, tokenizer, examples, [], config)
    wanted, names, accuracy = adapt(task, config, GatePretraining(), 0)
    expected = {name: value.clone() for name, value in wanted.base_model.layer().state_dict().items()}
    base = wanted.base_model.unload()
    torch.manual_seed(0)
    model = get_peft_model(base, sm.MoPsConfig(
        task_type="CAUSAL_LM", num_experts=7, experts=kind, visible_to=visible, **own))  # fmt: skip
    found = sm.prepare(model, tokenizer, examples)
    assert (found.expert_names, found.gate_accuracy) == (names, accuracy) and len(found.rows) == len(task.train)
    prepared = model.base_model.layer().state_dict()
    for name in ("mops_keys.default", "mops_values.default", "mops_prompts.default", "mops_gate_mean.default"):
        assert (name in expected) == (name in prepared)
        assert name not in expected or torch.equal(expected[name], prepared[name]), name
    batch = found.collator(list(found.rows[:4]))
    assert "gate_mask" in batch, "in the plain frame nothing else says what the gate is to read"
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_what_cannot_be_prepared_is_refused() -> None:
    base, tokenizer = sm.load_base("tiny", "float32")
    with pytest.raises(ValueError, match=r"has no experts to prepare: give get_peft_model\(base, MoPsConfig"):
        sm.prepare(base, tokenizer, [])
    model = get_peft_model(base, sm.MoPsConfig(task_type="CAUSAL_LM", num_recovery_prompts=2))
    with pytest.raises(ValueError, match=r"num_recovery_prompts=2: .* choose 0"):
        sm.prepare(model, tokenizer, sm.read("office")[:10])
    base, tokenizer = sm.load_base("tiny", "float32")
    model = get_peft_model(base, sm.MoPsConfig(task_type="CAUSAL_LM"))
    with pytest.raises(sm.DataError, match=r"examples=\[\]: give a list of one smartmops.Example or more"):
        sm.prepare(model, tokenizer, [])
    examples = sm.read("office")[::20]
    for given, said in {
        "unrelated": (3, "unrelated=3: give a file of texts"), "template": (3, "template=3: give text"),
        "max_length": ("3", "max_length='3': give a whole number"), "seed": (1.5, "seed=1.5: give a whole number"),
        "gate": ("cluster", "gate='cluster': choose labels, clusters, none, or None"),
    }.items():  # fmt: skip
        with pytest.raises(sm.SmartmopsError, match=re.escape(said[1])):
            inspect.unwrap(sm.prepare)(model, tokenizer, examples, **{given: said[0]})
    with pytest.raises(sm.SmartmopsError, match="tokenizer='None': give the model's tokenizer"):
        sm.prepare(model, None, examples)
    with pytest.raises(sm.DataError, match=r"give a list of one smartmops\.Example or more"):
        sm.prepare(model, tokenizer, [examples[0], "x"])


def test_fewer_experts_than_tasks_are_told_with_a_way_out_that_works() -> None:
    examples = sm.read("office")[::20]
    base, tokenizer = sm.load_base("tiny", "float32")
    model = get_peft_model(base, sm.MoPsConfig(task_type="CAUSAL_LM", num_experts=3))
    with pytest.raises(sm.AdapterError, match="num_experts=3, but the examples are of 7 tasks: choose 7, or gate='clu"):
        sm.prepare(model, tokenizer, examples)
    assert len(sm.prepare(model, tokenizer, examples, gate="clusters").expert_names) == 3


ODD: list[tuple[str, str]] = [
    ("sm.read(3)", "DataError: data=3 names no data"),
    ("sm.read([3])", "DataError: data=3 names no data"),
    ("sm.read('')", "DataError: no data are named: give a file"),
    ("sm.LoadedRun.chat(None, 'hello')", "DataError: message 1 is 'h'"),
    ("sm.LoadedRun.chat(None, 5)", "NoText: messages='5' is no list of messages"),
    ("sm.LoadedRun.generate(None, 5)", "WrongType: text=5: give text"),
    ("sm.LoadedRun.generate(None, None)", "WrongType: text=None: give text"),
    ("sm.LoadedRun.generate(None, ' ')", "ConfigError: text   is blank: give an instruction"),
    ("sm.LoadedRun.generate(None, 'x', [5])", "WrongType: context=[5]: give text"),
    ("sm.LoadedRun.generate(None, 'x', max_new_tokens=0)", "ConfigError: max_new_tokens=0: choose 1 or more"),
    ("sm.LoadedRun.save(None, 5)", "WrongType: folder=5: give a folder"),
    ("sm.load_run(3)", "WrongType: path=3: give a run folder"),
    ("sm.load_run([3])", "WrongType: path=[3]: give a run folder"),
    ("sm.load_run(None)", "WrongType: path=None: give a run folder"),
    ("sm.load_run('')", "ConfigError: path='' is blank: give a run folder"),
    ("sm.load_base(3)", "WrongType: model=3: give a folder, a *.gguf file"),
    ("sm.list_experts(3)", "WrongType: run=3: give a run folder"),
    ("sm.train(3)", "WrongType: config='3' is no TrainConfig: give one"),
    ("sm.train('')", "ConfigError: config='' is blank: give a YAML file of options"),
    ("sm.evaluate(sm.TrainConfig(model='tiny', data='office', out=Path('x')))", "is no EvaluateConfig: give one"),
    ("sm.train(model='tiny', data='office', out=3)", "WrongType: out=3: give a path"),
    ("sm.train(model='tiny', data='office', out='')", "WrongType: out: give a path"),
    ("sm.train(model='tiny', data='office', out=None)", "WrongType: out=None: give a path"),
    ("sm.read('office', columns=5)", "WrongType: --columns 5: give a list of FIELD=COLUMN"),
    ("sm.read('office', columns={'response': 'answer'})", "WrongType: --columns {'response': 'answer'}: give a list"),
    ("sm.read('office', columns=[5])", "WrongType: --columns 5: write FIELD=COLUMN"),
    ("sm.load_base('tiny', 3)", "ConfigError: dtype=3: choose auto, stored, float32"),
    ("sm.load_base('tiny', 'float32', 'int9')", "ConfigError: quantisation='int9': choose int8, nf4, int8-torchao"),
    ("sm.render(sm.load_base('tiny')[1], 'x', template=3)", "WrongType: template=3: give auto, chat, plain or a file"),
    ("sm.train(model=3, data='office', out='x')", "WrongType: MODEL 3: give text"),
    ("sm.train(model=3, data='office', out='x', steps=-1)", "ConfigError: MODEL 3: give text"),
    ("sm.render(3, 'x')", "WrongType: tokenizer='3': give the model's tokenizer"),
    ("sm.Example(3, '', 'x')", "NoText: `instruction` is '3', not text: give that"),
    ("sm.Example('x', '', 'x', history=3)", "NoText: `history` is '3', not pairs of question and answer"),
]


def test_what_is_of_another_type_is_one_line_of_ours(tmp_path: Path) -> None:
    """In a process of its own: here every signature is checked before the function is."""
    code = f"""if True:
        from pathlib import Path
        import smartmops as sm
        for call, words in {ODD!r}:
            try:
                eval(call)
            except sm.SmartmopsError as error:
                said = f"{{type(error).__name__}}: {{error}}"
                assert words in said and isinstance(error, (ValueError, TypeError)), (call, said)
            else:
                raise AssertionError(call)
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path,
                   env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_another_adapter_than_the_active_one_is_not_prepared() -> None:
    base, tokenizer = sm.load_base("tiny", "float32")
    config = sm.MoPsConfig(task_type="CAUSAL_LM", num_experts=2, init="random")
    model = get_peft_model(base, config)
    model.add_adapter("other", config)
    model.set_adapter("other")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        sm.AdapterError, match=r"active adapters are \['other'\], and the one called 'default' alone is"
    ):
        sm.prepare(model, tokenizer, sm.read("office")[:40])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
