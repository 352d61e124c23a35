"""What a changed run says: of itself, of what it was measured on and trained on; and what it leaves where it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import smartmops as sm
from smartmops.cli import evaluate_command
from smartmops.options.finished.reading import EvaluateConfig
from smartmops.report.report import report
from smartmops.runs.folder import Run

Added = tuple[Path, dict[str, Any]]


def card(run: Path) -> str:
    return (run / "adapter" / "README.md").read_text()


def metrics(run: Path) -> dict[str, Any]:
    return Run.open(run).read_metrics()


def test_what_is_known_of_an_expert_goes_with_it_in_place_too(added: Added, tmp_path: Path) -> None:
    own = shutil.copytree(added[0], tmp_path / "own")
    assert (own / "added.safetensors").is_file()
    sm.drop_expert(own, name="date", in_place=True)
    assert not (own / "added.safetensors").exists()


@pytest.mark.parametrize("dropped", [False, True])
def test_a_change_in_place_leaves_what_is_not_of_the_run(dropped: bool, run: Path, tmp_path: Path) -> None:
    own = shutil.copytree(run, tmp_path / "own")
    shutil.copytree(run, own / "child")
    (own / "child" / "link").symlink_to(tmp_path)
    for name in ("notes.txt", "evaluation.json", "checkpoints/mine.txt"):
        (own / name).write_text(name)
    (own / "shortcut").symlink_to("notes.txt")
    before = {file.relative_to(own): file.read_bytes() for file in (own / "child").rglob("*") if file.is_file()}
    if dropped:
        sm.drop_expert(own, name="cherry", in_place=True)
    else:
        sm.rename_expert(own, name="cherry", to="kirsche", in_place=True)
    assert {file.relative_to(own): file.read_bytes() for file in (own / "child").rglob("*") if file.is_file()} == before
    assert (own / "notes.txt").read_text() == "notes.txt" and (own / "checkpoints/mine.txt").is_file()
    assert (own / "shortcut").is_symlink() and (own / "child" / "link").is_symlink()
    assert (own / "evaluation.json").exists() is not dropped, "what was measured holds still, unless answers change"
    assert [item.name for item in tmp_path.iterdir()] == ["own"] and not (own / ".lock").exists()
    assert "cherry" not in sm.load_run(own).experts and len(sm.load_run(own / "child").experts) == 3


def test_a_copy_stands_in_for_a_link_where_there_are_none(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*given: Any, **options: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    own = shutil.copytree(run, tmp_path / "own")
    (own / "notes.txt").write_text("mine")
    monkeypatch.setattr("os.link", none)
    sm.freeze_expert(own, name="cherry", in_place=True)
    assert (own / "notes.txt").read_text() == "mine"


def test_examples_that_an_added_expert_was_trained_on_are_told(
    added: Added, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copy(folder / "new.jsonl", tmp_path / "other.jsonl")
    evaluate_command(EvaluateConfig(added[0], data=str(data)))
    told = " ".join(capsys.readouterr().out.split())
    assert "22 of 24 examples are of the data that" in told and "added was trained on" in told
    changed = shutil.copytree(added[0], tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text())
    config["changed"][0]["trained_on"]["test"] = "another"
    (changed / "config.json").write_text(json.dumps(config))
    evaluate_command(EvaluateConfig(changed, data=str(data)))
    assert "the data of `experts add date from new.jsonl` have changed" in " ".join(capsys.readouterr().out.split())
    del config["changed"][0]["trained_on"]  # as versions before wrote it
    (changed / "config.json").write_text(json.dumps(config))
    evaluate_command(EvaluateConfig(changed, data=str(data)))
    assert "may have been trained on some of these examples" in " ".join(capsys.readouterr().out.split())


def test_an_expert_from_another_run_may_have_seen_anything(
    added: Added, run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sm.add_expert(run, source=f"{added[0]}:date", data=str(folder / "new.jsonl"), out=tmp_path / "moved")
    evaluate_command(EvaluateConfig(tmp_path / "moved", data=str(folder / "new.jsonl")))
    assert "may have been trained on some of these examples" in " ".join(capsys.readouterr().out.split())


def test_numbers_of_other_rows_are_called_so_and_not_compared(run: Path, folder: Path, tmp_path: Path) -> None:
    sm.drop_expert(run, name="cherry", rows=2, out=tmp_path / "part")
    sm.drop_expert(run, name="cherry", old=str(folder / "new.jsonl"), out=tmp_path / "other")
    sm.drop_expert(run, name="cherry", out=tmp_path / "same")
    sm.rename_expert(tmp_path / "part", name="apple", to="apfel", out=tmp_path / "named")
    whole = metrics(run)["examples"]["test"]
    said = {"part": f"2 of the {whole} examples of the run's test split", "other": "2 examples of new.jsonl",
            "same": "the run's test split"}  # fmt: skip
    said["named"] = said["part"]
    for name, words in said.items():
        assert f"tokens of {words}:" in card(tmp_path / name)
        page = report([run, tmp_path / name], tmp_path / f"{name}.html").read_text()
        assert ("These runs differ in their test split" in page) is (name != "same"), name
    assert "measured_on" not in metrics(tmp_path / "same")


def test_stale_numbers_are_not_kept(run: Path, tmp_path: Path) -> None:
    own = shutil.copytree(run, tmp_path / "own")
    kept = metrics(own) | {"suites": {"mini": {}}, "gained": False}
    (own / "metrics.json").write_text(json.dumps(kept))
    sm.drop_expert(own, name="cherry", out=tmp_path / "dropped")
    sm.rename_expert(own, name="cherry", to="kirsche", out=tmp_path / "named")
    assert {"suites", "trainable_parameters", "best"}.isdisjoint(metrics(tmp_path / "dropped"))
    assert {"suites", "trainable_parameters", "best"} <= metrics(tmp_path / "named").keys()
    found = metrics(tmp_path / "dropped")
    assert found["gained"] is (found["perplexity"]["overall"] < found["perplexity_frozen"]["overall"])


def test_the_card_tells_what_an_added_expert_brought(added: Added, tmp_path: Path) -> None:
    new = added[1]["new"]
    line = (f"Expert `date`, added later: {new['frozen']:.2f} frozen, {new['before']:.2f} before and {new['after']:.2f} "
            f"with it, on {new['rows']} test examples of its own.")  # fmt: skip
    assert line in card(added[0])
    sm.rename_expert(added[0], name="date", to="dattel", out=tmp_path / "named")
    assert line.replace("date", "dattel") in card(tmp_path / "named")
    sm.drop_expert(tmp_path / "named", name="dattel", out=tmp_path / "dropped")
    assert "added later" not in card(tmp_path / "dropped")


def test_experts_of_a_comparison_change_too(folder: Path, tmp_path: Path) -> None:
    sm.compare(model=str(folder / "base"), dtype="float32", data=str(folder / "three.jsonl"), out=tmp_path / "both",
               experts=3, prompts_per_expert=3, steps=2, batch_size=4, max_length=96, samples_per_task=0, seeds=(0, 1),
               methods={"mops": None})  # fmt: skip
    sm.rename_expert(tmp_path / "both", name="apple", to="apfel", out=tmp_path / "named")
    assert "Means over seeds 0, 1" in card(tmp_path / "named")
    sm.drop_expert(tmp_path / "both", name="cherry", out=tmp_path / "dropped")
    assert "| adapted |" in card(tmp_path / "dropped") and "Means over seeds" not in card(tmp_path / "dropped")
    assert sm.load_run(tmp_path / "dropped").experts == ["apple", "banana"]
    report([tmp_path / "dropped"], tmp_path / "page.html")
