"""Help pages, examples, and options of a file under those that are typed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import smartmops as sm
from smartmops import cli
from smartmops.checks.errors import ConfigError
from smartmops.checks.limits import check
from smartmops.options.training import TrainConfig
from smartmops.settings.described import GROUPS
from smartmops.settings.examples import EXAMPLES
from smartmops.settings.line import asked

HEAVY = {"torch", "transformers", "peft", "datasets", "numpy", "flwr"}


def shown(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        asked(cli.COMMANDS, words)
    said = capsys.readouterr()
    assert stopped.value.code == 0 and said.err == ""
    return said.out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_page_has_a_sentence_options_and_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = shown([command, "--help"], capsys)
    assert page.startswith(f"usage: smartmops {command} ") and max(map(len, page.splitlines())) <= 140
    assert page.rstrip().splitlines()[-len(EXAMPLES[command]) :] == [f"  {line}" for line in EXAMPLES[command]]


ACTIONS = ("list", "add", "drop", "merge", "rename", "freeze", "calibrate")


@pytest.mark.parametrize("action", ACTIONS)
def test_an_action_has_a_page_of_its_own(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = shown(["experts", "add", action, "--help"], capsys)  # of a run that is called as an action is
    assert page.startswith(f"usage: smartmops experts RUN {action} ") and "default: None" not in page
    assert [line for line in EXAMPLES["experts"] if f" {action}" in line] == [
        line.strip() for line in page.partition("\nexamples\n")[2].splitlines()
    ]
    listed = [line.split("  ") for line in page.partition("show this page")[0].splitlines()[4:] if line.strip()]
    assert all(len([part for part in line if part]) == 2 for line in listed[:-1])  # each NAME has its words


def test_options_of_an_action_come_out_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "add.yaml"
    file.write_text("steps: 7\ndata: new.jsonl\nin_place: true\n")
    _, config = asked(cli.COMMANDS, ["experts", "runs/mine", "--config", str(file), "add", "--steps", "9"])
    assert (config.do.steps, config.do.data, config.do.in_place, config.do.batch_size) == (9, "new.jsonl", True, 4)
    with pytest.raises(ConfigError, match=r"line 1: unknown option 'steps'"):
        asked(cli.COMMANDS, ["experts", "runs/mine", "drop", "add", "--config", str(file)])


def test_the_page_of_train_has_groups_and_two_examples(capsys: pytest.CaptureFixture[str]) -> None:
    page = shown(["train", "--help"], capsys)
    for group in ("run", "base", "data", "method", "experts", "gate", "preparation", "training", "rates", "validation"):
        assert f"\n{group}: {GROUPS[group]}\n" in page
    assert len(EXAMPLES["train"]) == 2 and "--steps INT" in page and "(default: 1000)" in " ".join(page.split())


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_every_example_is_taken(line: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: tiny\ndata: office\nout: old\n")
    words = shlex.split(line.replace("runs/mine/config.yaml", str(tmp_path / "config.yaml")))
    assert words[0] == "smartmops"
    call, _ = asked(cli.COMMANDS, words[1:])
    assert callable(call)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("base: {model: tiny}\ndata: {data: office, validation: true}\ntraining: {steps: 4}\n"
                    "gate: {gate_renormalise: false}\n")  # fmt: skip
    words = ["train", "--config", str(file), "--out", "a", "--steps", "5", "--no-validation"]
    _, config = asked(cli.COMMANDS, words)
    assert config == TrainConfig(model="tiny", data="office", out=Path("a"), steps=5, gate_renormalise=False)
    assert asked(cli.COMMANDS, ["train", "smollm2", f"--config={file}", "--out", "a"])[1].model == "smollm2"
    with pytest.raises(ConfigError, match="--out"):
        asked(cli.COMMANDS, ["train", "--config", str(file)])
    file.write_text("methods: {mops: 3, lora: null}\nmodel: tiny\ndata: office\nout: a\n")
    assert asked(cli.COMMANDS, ["compare", "--config", str(file)])[1].methods == {"mops": 3.0, "lora": None}
    typed = ["compare", "--config", str(file), "--methods", "ia3", "1"]
    assert asked(cli.COMMANDS, typed)[1].methods == {"ia3": 1.0}


@pytest.mark.parametrize(("words", "said"), [
    (["trian"], "trian is no command: perhaps train is meant"),
    (["zzz"], "zzz is no command: choose quickstart, compress"),
    (["train", "--config"], "--config names no file"),
    (["train", "--config", "a", "--config=b"], "--config is given twice"),
    (["train", "--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
])  # fmt: skip
def test_a_wrong_line_is_told(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        asked(cli.COMMANDS, words)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["serve", "--help"], ["--version"]])
def test_help_imports_nothing_heavy_and_is_silent_otherwise(words: list[str]) -> None:
    code = f"""import sys
from smartmops.cli import main
try:
    main()
finally:
    assert not {HEAVY!r} & set(sys.modules), {HEAVY!r} & set(sys.modules)
    assert len(sys.modules) < 700, len(sys.modules)"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, *words], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])})  # fmt: skip
    assert done.returncode == 0 and done.stderr == "" and "smartmops" in done.stdout


def test_a_run_starts_again_from_the_file_it_left(tmp_path: Path) -> None:
    """Same options, same numbers bit for bit, on the command line and from Python."""
    first = sm.train(model="tiny", data="office", limit=84, steps=3, batch_size=2, experts=7, samples_per_task=0,
                     validation_limit=7, out=tmp_path / "first")  # fmt: skip
    file = tmp_path / "first" / "config.yaml"
    _, config = asked(cli.COMMANDS, ["train", "--config", str(file), "--out", str(tmp_path / "second")])
    again = sm.train(config)
    from_file = sm.train(config=str(file), out=tmp_path / "third")
    for other in (again, from_file):
        for name in ("perplexity", "perplexity_frozen"):
            assert other[name] == first[name]
    with pytest.raises(sm.RunError, match="exists and holds a finished run"):
        sm.train(config=file)
    with pytest.raises(sm.ConfigError, match=r"config\.yaml, line \d+: steps is 'x': give INT"):
        file.write_text(file.read_text().replace("steps: 3", "steps: x", 1))
        sm.train(config=file)


SMALL = dict(model="tiny", data="office", limit=84, batch_size=2, experts=7, samples_per_task=0)
RUNS: dict[str, dict[str, object]] = {
    "compare": SMALL | dict(methods={"mops": 0.01, "prompt-tuning": 0.01}, steps=2, validation_limit=7),
    "federate": SMALL | dict(clients=3, clients_per_round=2, rounds=1, local_steps=1),
    "compress": dict(model="tiny", calibration="office", limit=100, sparsity=0.5, sequences=4, sequence_length=64),
}
NUMBERS = ("perplexity", "perplexity_frozen", "perplexity_before", "perplexity_after", "sparsity", "per_seed")


@pytest.mark.parametrize("command", RUNS)
def test_every_command_that_makes_a_run_starts_again_from_its_file(command: str, tmp_path: Path) -> None:
    first = getattr(sm, command)(**RUNS[command], out=tmp_path / "first")
    words = [command, "--config", str(tmp_path / "first" / "config.yaml"), "--out", str(tmp_path / "second")]
    again = getattr(sm, command)(asked(cli.COMMANDS, words)[1])
    told = [name for name in NUMBERS if name in first]
    assert told and all(again[name] == first[name] for name in told)


def test_the_package_is_a_program_too() -> None:
    done = subprocess.run([sys.executable, "-m", "smartmops", "--version"], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])})  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("smartmops ")


def test_what_a_file_gives_in_vain_is_said_and_not_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """For a file may serve several methods."""
    file = tmp_path / "shared.yaml"
    file.write_text("model: tiny\ndata: office\ngate_lr: 0.5\nmethod: lora\nrecovery_prompts: 0\n")
    words, said = (
        ["train", "--config", str(file), "--out", str(tmp_path / "a")],
        "passed over: --gate-lr 0.5 is of a gate",
    )
    check(asked(cli.COMMANDS, words)[1], given=True)
    assert [each.startswith(said) for each in caplog.messages] == [True]
    with pytest.raises(ConfigError, match=r"--gate-lr 0\.25 is of a gate"):
        check(asked(cli.COMMANDS, [*words, "--gate-lr", "0.25"])[1], given=True)
    with pytest.raises(ConfigError, match=r"gate_lr 0\.25 is of a gate"):
        sm.train(config=file, out=tmp_path / "a", gate_lr=0.25)
    caplog.clear()
    check(asked(cli.COMMANDS, [*words, "--method", "mops", "--gate-lr", "0.25"])[1], given=True)
    assert not caplog.messages


@pytest.mark.parametrize(("option", "said"), [
    ("--experts 3", "--experts 3 is of prompts, and there are none"), ("--expert-kind hidden_states", "--expert-kind"),
    ("--samples-per-task 0 --gate-lr 0", None), ("--gate-lr 0.5 --resume", "--gate-lr 0.5 is of a gate that learns"),
])  # fmt: skip
def test_a_command_may_serve_several_methods_and_a_run_goes_on_as_it_began(
    option: str, said: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = shlex.split(f"train tiny --data office --method ia3 --out {tmp_path} {option}")
    check(asked(cli.COMMANDS, words)[1], given=True)
    assert [each.startswith(f"passed over: {said}") for each in caplog.messages] == [True] * (said is not None)
