"""Experts listed, dropped, merged, renamed, frozen, and the null expert calibrated; into a new folder, or in place."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import smartmops as sm
from smartmops.checks.errors import RunError


def test_each_expert_is_listed_with_what_it_is_for(run: Path) -> None:
    found = sm.list_experts(run)
    assert list(found["experts"]) == ["apple", "banana", "cherry"] and found["unread"] == ""
    for name, each in found["experts"].items():
        assert each["tasks"] == [name] and each["chosen_by"] == "gate" and not each["frozen"]
        assert each["usage"][name] > 0.5 and name not in each["nearest"] and len(each["nearest"]) == 2
    assert any(each["cost"]["after"] > each["cost"]["before"] for each in found["experts"].values())


def test_without_its_data_a_run_is_listed_by_its_tensors(run: Path, tmp_path: Path, folder: Path) -> None:
    shutil.copytree(run, tmp_path / "moved")
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    config["arguments"]["data"] = str(tmp_path / "gone.jsonl")
    (tmp_path / "moved" / "config.json").write_text(json.dumps(config))
    found = sm.list_experts(tmp_path / "moved")
    assert "gone.jsonl" in found["unread"] and "usage" not in found["experts"]["apple"]
    with pytest.raises(ValueError, match=r"cannot be used .* give instructions that the run serves by --old DATA"):
        sm.drop_expert(tmp_path / "moved", name="apple", out=tmp_path / "less")
    again = sm.list_experts(tmp_path / "moved", old=str(folder / "three.jsonl"))
    assert again["experts"]["apple"]["usage"]["apple"] > 0.5


def test_data_that_grew_since_are_neither_measured_nor_taken_for_the_runs_own(
    run: Path, tmp_path: Path, folder: Path
) -> None:
    shutil.copytree(run, tmp_path / "moved")
    grown = tmp_path / "three.jsonl"
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    config["arguments"]["data"] = str(grown)
    (tmp_path / "moved" / "config.json").write_text(json.dumps(config))
    shutil.copy(folder / "three.jsonl", grown)
    same = sm.evaluate(run=tmp_path / "moved")["perplexity"]
    assert same["overall"] == pytest.approx(sm.evaluate(run=run)["perplexity"]["overall"], rel=1e-6)
    with grown.open("a") as file:
        file.write((folder / "new.jsonl").read_text())
    with pytest.raises(RunError, match=r"have changed since it was trained \(test split .* or their tasks .* bring"):
        sm.evaluate(run=tmp_path / "moved")
    assert sm.evaluate(run=tmp_path / "moved", data=str(folder / "new.jsonl"))["perplexity"]["overall"] > 0
    assert "have changed since" in sm.list_experts(tmp_path / "moved")["unread"]
    with pytest.raises(
        RunError, match=r"cannot be used \(the data of .* give instructions that the run serves by --old"
    ):
        sm.drop_expert(tmp_path / "moved", name="apple", out=tmp_path / "less")


@pytest.mark.parametrize("name", ["auto", "base"])
def test_no_expert_is_called_what_means_something_else_to_a_server(
    run: Path, folder: Path, tmp_path: Path, name: str
) -> None:
    says = rf"{name}.* is what a server calls the (gate|base): choose another"
    with pytest.raises(ValueError, match=says):
        sm.rename_expert(run, name="apple", to=name, out=tmp_path / "other")
    rows = (folder / "three.jsonl").read_text().replace('"apple"', f'"{name}"')
    (tmp_path / "three.jsonl").write_text(rows)
    with pytest.raises(ValueError, match=rf"a task is called '{name}', which is what a server calls"):
        sm.train(model=str(folder / "base"), data=str(tmp_path / "three.jsonl"), experts=3, out=tmp_path / "run")
    (tmp_path / f"{name}.jsonl").write_text((folder / "new.jsonl").read_text().replace('"date"', f'"{name}"'))
    with pytest.raises(ValueError, match=says):
        sm.add_expert(run, data=str(tmp_path / f"{name}.jsonl"), out=tmp_path / "added", steps=2)


def test_what_went_to_a_dropped_expert_goes_elsewhere(run: Path, tmp_path: Path) -> None:
    found = sm.drop_expert(run, name="banana", out=tmp_path / "less")
    assert sum(found["goes_to"].values()) == pytest.approx(1) and "banana" not in found["goes_to"]
    assert sm.load_run(tmp_path / "less").experts == ["apple", "cherry"]
    told = json.loads((tmp_path / "less" / "metrics.json").read_text())
    assert told["perplexity"]["overall"] == pytest.approx(found["perplexity"]["after"])
    assert sm.evaluate(run=tmp_path / "less")["perplexity"]["overall"] == pytest.approx(
        found["perplexity"]["after"], rel=1e-5
    )


def test_two_become_one_and_the_third_stays(
    run: Path, tmp_path: Path, adapter_of: Callable[[Path], dict[str, Any]]
) -> None:
    found = sm.merge_experts(run, first="apple", second="cherry", out=tmp_path / "one", steps=20, relative_lr=0.3)
    assert found["name"] == "apple+cherry" and found["perplexity"]["after"] < found["untrained"]
    was, now = adapter_of(run), adapter_of(tmp_path / "one")
    assert torch.equal(was["mops_keys"][3:6], now["mops_keys"][3:6])
    loaded = sm.load_run(tmp_path / "one")
    assert loaded.experts == ["apple+cherry", "banana"]
    assert loaded.gate("cherry cherry number 3.")["apple+cherry"] > 0.5


def test_a_frozen_expert_is_not_merged(run: Path, tmp_path: Path) -> None:
    assert sm.freeze_expert(run, name="banana", out=tmp_path / "frozen")["frozen"] == ["banana"]
    assert sm.list_experts(tmp_path / "frozen")["experts"]["banana"]["frozen"]
    with pytest.raises(ValueError, match="'banana' is frozen, and merging changes it"):
        sm.merge_experts(tmp_path / "frozen", first="apple", second="banana", out=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert sm.freeze_expert(tmp_path / "frozen", name="banana", off=True, in_place=True)["frozen"] == []


def test_changes_in_place_are_made_one_at_a_time(run: Path, tmp_path: Path) -> None:
    """Two at once would each write what the run was before, and one of them would be lost."""
    shutil.copytree(run, tmp_path / "own")
    program = "import sys; from pathlib import Path; from smartmops.checks.lock import alone\n" \
              "with alone(Path(sys.argv[1])): print(flush=True); input()"  # fmt: skip
    other = [sys.executable, "-c", program, str(tmp_path / "own")]
    with subprocess.Popen(other, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(RunError, match=r"own is in use by process \d+"):
            sm.rename_expert(tmp_path / "own", name="cherry", to="kirsche", in_place=True)
        process.communicate("\n")
    sm.rename_expert(tmp_path / "own", name="cherry", to="kirsche", in_place=True)


def test_a_run_whose_change_in_place_was_killed_is_found_again(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / ".own.before.tmp")
    with pytest.raises(ValueError, match=r"was killed: it is .*\.own\.before\.tmp as it was before, rename that"):
        sm.list_experts(tmp_path / "own")


@pytest.mark.parametrize("in_place", [False, True])
def test_a_killed_change_leaves_a_folder_that_can_be_written_again(
    in_place: bool, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*given: Any) -> None:
        raise SystemExit  # nothing is tidied up after a kill

    if in_place:
        run = shutil.copytree(run, tmp_path / "new")
    where: dict[str, Any] = {"in_place": True} if in_place else {"out": tmp_path / "new"}
    monkeypatch.setattr("smartmops.surgery.written.number", killed)
    monkeypatch.setattr(shutil, "rmtree", lambda *given, **options: None)
    with pytest.raises(SystemExit):
        sm.rename_expert(run, name="cherry", to="kirsche", **where)
    (left,) = tmp_path.rglob("*.tmp")
    left.rename(left.with_name(".new.1.tmp"))  # the killed process had another number
    monkeypatch.undo()
    sm.rename_expert(run, name="cherry", to="kirsche", **where)
    assert sm.load_run(tmp_path / "new").experts[2] == "kirsche"
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_name_changes_in_place_and_nothing_else(
    run: Path, tmp_path: Path, adapter_of: Callable[[Path], dict[str, Any]]
) -> None:
    shutil.copytree(run, tmp_path / "own")
    assert sm.rename_expert(tmp_path / "own", name="cherry", to="kirsche", in_place=True)["experts"][2] == "kirsche"
    was, now = adapter_of(run), adapter_of(tmp_path / "own")
    assert all(torch.equal(now[name], value) for name, value in was.items())
    gates = [json.loads((path / "gates.json").read_text()) for path in (run, tmp_path / "own")]
    assert gates[1] == gates[0] | {"experts": ["apple", "banana", "kirsche"]}
    nearest = json.loads((tmp_path / "own" / "metrics.json").read_text())["gate"]["cherry"]["nearest"]
    assert nearest in ("apple", "banana", "kirsche")
    told = [json.loads((path / "metrics.json").read_text())["perplexity"] for path in (run, tmp_path / "own")]
    assert told[0] == told[1] and [each.name for each in tmp_path.iterdir()] == ["own"]
    assert sm.evaluate(run=tmp_path / "own")["perplexity"]["overall"] == pytest.approx(told[0]["overall"], rel=1e-5)


def test_a_change_that_fails_leaves_the_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(run, tmp_path / "own")

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("smartmops.surgery.written.keep", fail)
    for where in ({"in_place": True}, {"out": tmp_path / "other"}):
        with pytest.raises(OSError, match="no space left"):
            sm.rename_expert(tmp_path / "own", name="cherry", to="kirsche", **where)
    assert [each.name for each in tmp_path.iterdir()] == ["own"]
    assert sm.load_run(tmp_path / "own").experts[2] == "cherry"


def test_text_that_should_be_left_alone_sets_the_threshold(run: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text(
        "\n\n".join(f"Once upon a time, on day {i}, a king went out." for i in range(30))
    )
    found = sm.calibrate(run, unrelated=str(tmp_path / "texts.txt"), out=tmp_path / "set")
    through = found["let_through"]
    assert through["after"]["unrelated"] <= through["before"]["unrelated"] and through["after"]["own"] >= 0.8
    assert through["after"]["unrelated"] < 0.1
    assert sm.load_run(tmp_path / "set").model.peft_config["default"].null_threshold == found["threshold"]


@pytest.mark.parametrize(("options", "said"), [
    ({"name": "fig"}, "'fig' is no expert of .* choose one of apple, banana, cherry"),
    ({"name": "apple", "in_place": True}, "give one of them"),
])  # fmt: skip
def test_a_wrong_name_or_place_is_told(run: Path, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sm.drop_expert(run, out=tmp_path / "none", **options)
    with pytest.raises(FileExistsError, match=r"exists and holds a finished run: choose another folder$"):
        sm.drop_expert(run, name="apple", out=run)
