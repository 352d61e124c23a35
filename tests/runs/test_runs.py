"""Run folders: whole files or none, exact resume, and errors that say the way out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from smartmops.runs import folder as runs
from smartmops.runs.folder import Run, check_adapter, write_text

CONFIG = {"command": "train", "arguments": {"steps": 200, "out": "runs/x"}, "seed": 3, "base": "tiny"}


def adapter(value):
    """What `model.save_pretrained` does, in small."""

    def save(folder):
        save_file({"mops_prompts": torch.full((4, 2), float(value))}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text("{}")

    return save


def value_of(run):
    return load_file(run.adapter_dir / "adapter_model.safetensors")["mops_prompts"][0, 0].item()


def test_a_run_is_read_as_it_was_written(tmp_path):
    run = Run.create(tmp_path / "deep" / "run", CONFIG)
    assert not run.finished and run.checkpoints.is_dir() and run.last_step() is None
    run.append_curve({"step": 10, "loss": np.float32(1.5)})
    run.append_curve({"step": 20, "loss": torch.tensor(0.5), "grad_norm": float("inf")})
    run.write_gates({"experts": ("a", "b"), "before": {"a": np.array([0.25, 0.75])}})
    run.write_samples([{"category": "qa", "adapted": "zwölf\nline \ud800"}])
    run.save_adapter(adapter(7))
    run.write_metrics({"perplexity": {"overall": float("nan"), "per_task": {"qa": 1.25}}})
    again = Run.open(run.path)
    assert again == run and again.finished
    assert again.read_curves() == [{"step": 10, "loss": 1.5}, {"step": 20, "loss": 0.5, "grad_norm": None}]
    assert again.last_step() == 20
    assert again.read_gates() == {"experts": ["a", "b"], "before": {"a": [0.25, 0.75]}}
    assert again.read_samples() == [{"category": "qa", "adapted": "zwölf\nline \ud800"}]
    assert again.read_metrics() == {"perplexity": {"overall": None, "per_task": {"qa": 1.25}}}
    assert value_of(again) == 7
    assert not [item for item in run.path.iterdir() if item.name.startswith(".")]


def test_config_names_versions_and_seeds(tmp_path):
    stored = json.loads((Run.create(tmp_path / "x", CONFIG).path / "config.json").read_text())
    assert stored.items() >= CONFIG.items() and stored["seeds"] == [3]
    assert stored["versions"].keys() == {"python", "torch", "transformers", "peft", "smartmops"}
    assert stored["versions"]["torch"] == torch.__version__
    with pytest.raises(ValueError, match="names no seed"):
        Run.create(tmp_path / "y", {"command": "train"})
    assert not (tmp_path / "y").exists()


def test_a_folder_in_use_is_refused(tmp_path):
    path, config = tmp_path / "x", CONFIG
    run = Run.create(path, config)
    with pytest.raises(FileExistsError, match=r"an unfinished run: choose another folder, or resume with --resume"):
        Run.create(path, config)
    run.write_metrics({})
    with pytest.raises(FileExistsError) as refused:
        Run.create(path, config)
    assert str(refused.value) == (
        f"--out {path} exists and holds a finished run: choose another folder, or resume with --resume"
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match=r"thesis\.tex.*choose another folder"):
            Run.create(tmp_path / "other", config, resume=resume)
    with pytest.raises(NotADirectoryError, match="is a file"):
        Run.create(tmp_path / "other" / "thesis.tex", config)


def test_a_new_or_empty_folder_can_be_resumed(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / ".config.json.1.tmp").write_text("{")  # killed before anything was whole
    assert Run.create(tmp_path / "x", CONFIG, resume=True).read_curves() == []
    assert os.listdir(tmp_path / "x") != [] and not list((tmp_path / "x").glob(".*"))
    (tmp_path / "x" / "checkpoints" / ".round.safetensors.1.tmp").write_text("half")
    Run.create(tmp_path / "x", CONFIG, resume=True)
    assert not list((tmp_path / "x" / "checkpoints").iterdir())


def test_a_folder_that_is_not_there_is_not_begun(tmp_path):
    Run.create(tmp_path / "first", CONFIG)
    with pytest.raises(FileNotFoundError, match=r"frist does not exist.*there is .*first\), or leave --resume away"):
        Run.create(tmp_path / "frist", CONFIG, resume=True)
    assert not (tmp_path / "frist").exists()


def test_other_inputs_are_refused_with_both_fingerprints(tmp_path):
    run = Run.create(tmp_path / "x", CONFIG)
    run.same_inputs({"base": "aa", "data set": "bb"})
    run.same_inputs({"base": "aa", "data set": "bb"})
    with pytest.raises(ValueError, match=r"started with another data set \(fingerprint bb, now cc\): give what it was"):
        run.same_inputs({"base": "aa", "data set": "cc"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arguments": {"steps": 300, "out": "runs/x"}}, "arguments.steps=200, but now arguments.steps=300"),
        ({"seed": 4}, "seed=3, but now seed=4"),
        ({"base": None}, 'base="tiny", but now base=null'),
        ({"data": "dolly"}, 'data=null, but now data="dolly"'),
    ],
)
def test_resuming_another_run_is_refused(tmp_path, change, message):
    Run.create(tmp_path / "x", CONFIG)
    with pytest.raises(ValueError, match="choose another folder with --out") as refused:
        Run.create(tmp_path / "x", CONFIG | change, resume=True)
    assert message in str(refused.value)


def test_resuming_elsewhere_or_with_other_versions(tmp_path):
    first = Run.create(tmp_path / "x", CONFIG)
    moved = CONFIG | {"arguments": {"steps": 200, "out": "runs/y", "resume": True}}
    assert Run.create(tmp_path / "x", moved, resume=True) == first
    old = first.config | {"versions": first.config["versions"] | {"torch": "1.0"}}
    write_text(first.path / "config.json", json.dumps(old))
    with pytest.warns(UserWarning, match=r"torch 1\.0 -> "):
        Run.create(tmp_path / "x", CONFIG, resume=True)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 10_000))
def test_a_kill_at_any_byte_leaves_a_prefix(tmp_path, cut):
    rows = [{"step": step, "loss": step / 7, "note": "é\n"} for step in range(1, 9)]
    path = tmp_path / str(cut)
    path.mkdir(exist_ok=True)
    run = Run.create(path, CONFIG, resume=True)
    for row in rows:
        run.append_curve(row)
    whole = (path / "curves.jsonl").read_bytes()
    cut %= len(whole) + 1
    (path / "curves.jsonl").write_bytes(whole[:cut])
    kept = run.read_curves()
    assert kept == rows[: len(kept)] and len(kept) >= whole[:cut].count(b"\n")
    run = Run.create(path, CONFIG, resume=True)
    run.append_curve({"step": 99})
    assert run.read_curves() == [*kept, {"step": 99}]
    (path / "curves.jsonl").unlink()


def test_a_killed_writer_can_be_resumed(tmp_path):
    code = (
        "import itertools, runpy, sys\n"
        "run = runpy.run_path(sys.argv[1])['Run'].create(sys.argv[2], {'seed': 3})\n"
        "for step in itertools.count(1):\n"
        "    run.append_curve({'step': step}); run.write_gates({'experts': ['a'] * 999})\n"
        "    if step == 20: print('ready', flush=True)"
    )
    command = [sys.executable, "-c", code, runs.__file__, str(tmp_path / "x")]  # the file alone starts without torch
    writer = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert writer.stdout.readline().strip() == b"ready"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    run = Run.create(tmp_path / "x", {"seed": 3}, resume=True)
    steps = [row["step"] for row in run.read_curves()]
    assert len(steps) >= 20 and steps == list(range(1, len(steps) + 1))
    assert run.read_gates() == {"experts": ["a"] * 999}
    assert not list(run.path.glob(".*"))


def test_rewind_discards_what_is_logged_again(tmp_path):
    run = Run.create(tmp_path / "x", CONFIG)
    run.rewind(5)
    rows = [{"step": s, "method": m} for m in ("ungated", "mops") for s in (10, 20, 30)]
    for row in rows:
        run.append_curve(row)
    run.rewind(10, method="mops")
    assert run.read_curves() == rows[:4]
    run.rewind(20)
    assert run.read_curves() == [rows[0], rows[1], rows[3]]
    with pytest.raises(ValueError, match="needs a step"):
        run.append_curve({"loss": 1})


def test_a_failing_write_changes_nothing(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "x", CONFIG)
    run.write_gates({"experts": ["a"]})
    with pytest.raises(TypeError):
        run.write_gates({"experts": [object()]})
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk"):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
        run.write_gates({"experts": ["b"]})
    assert run.read_gates() == {"experts": ["a"]} and not list(run.path.glob(".*"))


def test_adapters_are_swapped_whole(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "x", CONFIG)
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        run.save_adapter(lambda folder: None)
    assert run.save_adapter(adapter(1)) == run.adapter_dir
    for broken in (lambda folder: 1 / 0, lambda folder: (adapter(2)(folder), truncate(folder, 50))):
        with pytest.raises((ZeroDivisionError, ValueError)):
            run.save_adapter(broken)
        assert value_of(run) == 1
    rename = os.rename
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", lambda a, b: die() if b == run.adapter_dir else rename(a, b))
        run.save_adapter(adapter(2))
    assert not run.adapter_dir.exists()  # stopped between the two renames
    run = Run.create(run.path, CONFIG, resume=True)
    assert value_of(run) == 1
    run.save_adapter(adapter(2))
    assert value_of(run) == 2 and not list(run.path.glob(".*"))


def die():
    raise KeyboardInterrupt


def truncate(folder, size):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:size])


@pytest.mark.parametrize("size", [0, 4, 30, -1])
def test_a_truncated_adapter_is_refused(tmp_path, size):
    adapter(1)(tmp_path)
    check_adapter(tmp_path)
    truncate(tmp_path, size)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged or cut short \(\d+ bytes.*resume"):
        check_adapter(tmp_path)


def test_a_damaged_adapter_is_refused(tmp_path):
    adapter(1)(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:8] + b"#" + whole[9:])
    with pytest.raises(ValueError, match="damaged"):
        check_adapter(tmp_path)
    save_file({}, file)
    with pytest.raises(ValueError, match="no tensors"):
        check_adapter(tmp_path)
    file.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin is a pickle, which is never read"):
        check_adapter(tmp_path)
    adapter(1)(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{'")
    with pytest.raises(ValueError, match=r"adapter_config\.json is not valid JSON"):
        check_adapter(tmp_path)


def test_readers_say_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Run.open(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json, so it is no run folder"):
        Run.open(tmp_path)
    run = Run.create(tmp_path / "x", CONFIG)
    run.append_curve({"step": 20})
    with pytest.raises(FileNotFoundError, match=r"unfinished.*last logged step: 20.*--resume"):
        Run.open(run.path)
    assert Run.open(run.path, unfinished=True) == run
    (run.path / "curves.jsonl").write_text('{"step": 1}\nnot JSON\n')
    with pytest.raises(ValueError, match=r"curves\.jsonl, line 2 is not valid JSON"):
        run.read_curves()
    (run.path / "curves.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"curves\.jsonl, line 1 is not a JSON object"):
        run.read_curves()
    for name in ("metrics.json", "config.json"):
        for text in ('{"perplexity": ', "[1]"):
            (run.path / name).write_text(text)
            with pytest.raises(ValueError, match=rf"{name} (is not valid JSON|holds \[1\], not a JSON object)"):
                Run.open(run.path)
