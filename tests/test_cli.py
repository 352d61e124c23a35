"""The commands end to end on the embedded base, and errors as one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smartmops import cli
from smartmops.cli import EvaluateConfig, InspectConfig, ReportConfig
from smartmops.compression.compress import CompressConfig
from smartmops.flow.trainer import TrainConfig
from smartmops.options.finished.reading import DataConfig
from smartmops.options.finished.surgery import ExpertsConfig, ListConfig
from smartmops.runs.folder import Run


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "quick"
    cli.quickstart(out, steps=6, seeds=(0,))
    return out


@pytest.mark.slow
def test_quickstart_leaves_numbers_adapter_gates_samples_and_report(quick: Path) -> None:
    run = Run.open(quick)
    metrics = run.read_metrics()
    assert set(metrics["perplexity"]) == {"frozen", "four_in_context", "ungated", "mops"}
    assert metrics["perplexity"]["four_in_context"] < 0.6 * metrics["perplexity"]["frozen"], (
        "the base reads its context"
    )
    assert metrics["perplexity"]["mops"] < metrics["perplexity"]["frozen"], "even a few steps help"
    assert all(len(metrics["per_task"][method]) == 7 for method in metrics["perplexity"])
    gates = run.read_gates()
    assert gates is not None and len(gates["experts"]) == 7 and gates["accuracy"] > 0.95
    assert len(run.read_samples()) == 7
    page = (quick / "report.html").read_text()
    assert "<script src" not in page and "http-equiv" in page and "closed qa" in page.lower().replace("_", " ")


@pytest.mark.slow
def test_evaluate_repeats_the_number_of_the_run(quick: Path) -> None:
    found = cli.evaluate_command(EvaluateConfig(quick))
    assert found["perplexity"]["overall"] == pytest.approx(
        Run.open(quick).read_metrics()["perplexity"]["mops"], rel=1e-4
    )
    assert json.loads((quick / "evaluation.json").read_text())["perplexity"] == found["perplexity"]


@pytest.mark.slow
def test_inspect_names_the_expert_of_the_task(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = cli.inspect_command(InspectConfig(quick, text="What is the capital of France?", max_new_tokens=8))
    assert sum(found["gate"].values()) == pytest.approx(1, abs=1e-5)
    assert max(found["gate"], key=found["gate"].get) == "open_qa"
    printed = capsys.readouterr().out
    assert "open_qa" in printed
    assert all(word in printed for word in found["adapted"].split()), "brackets of an answer are printed too"


@pytest.mark.slow
def test_report_of_several_runs_goes_where_asked(quick: Path, tmp_path: Path) -> None:
    path = cli.report_command(ReportConfig((quick, quick), tmp_path / "both.html"))
    assert path.exists() and path.stat().st_size > 10_000


@pytest.mark.slow
def test_compress_writes_a_model_that_train_takes_and_inspect_says_what_is_left_to_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = cli.compress_command(
        CompressConfig(
            model="tiny",
            out=tmp_path / "base",
            calibration="office",
            limit=200,
            pattern="7:8",
            sequences=16,
            sequence_length=64,
        )
    )
    assert found["sparsity"] == pytest.approx(0.875, abs=1e-6)
    assert f"{found['perplexity_after']:.3f}" in capsys.readouterr().out
    config = TrainConfig(model=str(tmp_path / "base"), data="office", out=tmp_path / "run", steps=2, limit=100,
                         dtype="float32", samples_per_task=0)  # fmt: skip
    assert cli.train_command(config)["perplexity_frozen"]["overall"] > found["perplexity_before"]
    capsys.readouterr()
    seen = cli.inspect_command(InspectConfig(tmp_path / "run", text="What is the capital of France?", max_new_tokens=4))
    assert sum(seen["gate"].values()) + seen["left_to_base"] == pytest.approx(1, abs=1e-5)
    assert f"{seen['left_to_base']:.3f}" in capsys.readouterr().out.split("left to the base")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nowhere"], "nowhere does not exist"),
        (["report"], "0 run folders given"),
        (["train", "tiny", "--data", "missing.jsonl", "--out", "OUT"], "no such file"),
        (["train", "tiny", "--data", "office", "--out", "OUT", "--injection-layer", "40"], "choose 0 to 7"),
        (["compress", "tiny", "--out", "OUT"], "nothing to do: give --sparsity 0.75 or --pattern 7:8"),
        (["compress", "tiny", "--out", "OUT", "--sparsity", "1"], "choose a share of zeros between 0 and 1"),
        (["compress", "tiny", "--out", "OUT", "--pattern", "9:8"], "--pattern 9:8: n:m prunes n of every m"),
        (["compress", "tiny", "--out", "OUT", "--pattern", "4:7"], "has 256 inputs, which 7 does not divide"),
    ],
)
def test_a_users_error_is_one_line_and_status_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["smartmops", *(a.replace("OUT", str(tmp_path / "run")) for a in arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in " ".join(error.split()) and "Traceback" not in error


def test_every_command_has_a_help_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for command in cli.COMMANDS:
        monkeypatch.setattr("sys.argv", ["smartmops", command, "--help"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 0
        assert len(capsys.readouterr().out) > 200


@pytest.mark.slow
def test_brackets_in_names_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names, data = ("[/b]", "qa [bold]", "[red]"), tmp_path / "[green] rows.jsonl"
    data.write_text("".join(json.dumps({"instruction": f"Say [/i] {i}", "response": f"[/x] {i}", "category": name}) + "\n"
                            for i in range(8) for name in names))  # fmt: skip
    cli.train_command(
        TrainConfig(model="tiny", data=str(data), experts=3, steps=2, batch_size=4, out=tmp_path / "[run]")
    )
    cli.evaluate_command(EvaluateConfig(tmp_path / "[run]", answers=1, answer_tokens=2))
    cli.inspect_command(InspectConfig(tmp_path / "[run]", text="Say [/i] 3", max_new_tokens=2))
    cli.experts_command(ExpertsConfig(run=tmp_path / "[run]", do=ListConfig()))
    cli.data_command(DataConfig(data=str(data), model="tiny"))
    printed = capsys.readouterr().out
    assert all(printed.count(name) >= 5 for name in names)
