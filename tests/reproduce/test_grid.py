"""A cell runs once; deleting its results runs it alone, with the same numbers; tables come back byte for byte."""

from __future__ import annotations

import json
import math
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from smartmops.checks.errors import ConfigError, RunError
from smartmops.methods.baselines import load_run
from smartmops.options import reproduce as options
from smartmops.reproduce import grid as module
from smartmops.reproduce.grid import Base, Cell, Data, Grid
from smartmops.reproduce.plan import datas_of
from smartmops.reproduce.reproduce import ReproduceConfig, plan_of, reproduce
from smartmops.reproduce.studies import STUDIES


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own file: 3 tasks, 200 lines."""
    file = tmp_path_factory.mktemp("data") / "mine.jsonl"
    tasks = ("apple", "banana", "cherry")
    rows = [{"instruction": f"{tasks[i % 3]} number {i}.", "response": tasks[i % 3][0] * 4, "category": tasks[i % 3]}
            for i in range(200)]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def config(base_folder: Path, mine: Path, tmp_path: Path) -> Callable[..., ReproduceConfig]:
    def make(**changes: Any) -> ReproduceConfig:
        settings: dict[str, Any] = {
            "name": "table3", "model": str(base_folder), "data": (str(mine),), "out": tmp_path / "out", "seeds": (0,),
            "bases": ("dense", "2:4"), "clients": 6, "clients_per_round": 2, "rounds": 2, "local_steps": 2, "limit": 0,
            "eval_every": 1, "methods": ("fedprompt", "mops"), "tune": False, "max_length": 96,
        }  # fmt: skip
        return ReproduceConfig(**(settings | changes))

    return make


def stored(out: Path) -> dict[str, Any]:
    return {file.name: json.loads(file.read_text()) for file in (out / "results").glob("*.json")}


def test_deleting_one_result_runs_that_cell_alone_and_gives_the_same_numbers(
    config: Callable[..., ReproduceConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config()
    out = settings.out
    assert out is not None
    assert reproduce(settings) == {"cells": 4, "missing": 0}
    before, page = stored(out), (out / "table3.md").read_bytes()
    gone = sorted(before)[2]
    (out / "results" / gone).unlink()
    shutil.rmtree(out / "runs" / gone.removesuffix(".json"))
    ran: list[Any] = []
    real = module.federate
    monkeypatch.setattr(module, "federate", lambda given: [ran.append(given), real(given)][1])
    reproduce(settings)
    assert len(ran) == 1 and ran[0].out.name == gone.removesuffix(".json")
    again = stored(out)
    assert again.keys() == before.keys()
    assert again[gone]["metrics"]["perplexity"] == before[gone]["metrics"]["perplexity"]
    assert (out / "table3.md").read_bytes() == page


def test_deleted_tables_and_pictures_come_back_byte_for_byte(config: Callable[..., ReproduceConfig]) -> None:
    settings = config(bases=("dense",))
    out = settings.out
    assert out is not None
    reproduce(settings)
    made = {file.name: file.read_bytes() for file in out.iterdir() if file.suffix in (".md", ".png", ".svg")}
    assert {"table3.md", "table3_rounds_mine.png", "table3_rounds_mine.svg"} <= made.keys()
    assert f"Model: {Path(settings.model).name}; all examples of each data set." in made["table3.md"].decode()
    for name in made:
        (out / name).unlink()
    reproduce(config(bases=("dense",), tables_only=True))
    assert {name: (out / name).read_bytes() for name in made} == made


CENTRAL = {"methods": (), "bases": (), "steps": 1, "batch_size": 2, "rounds": 1, "local_steps": 1}


def test_columns_of_other_names_go_through_training_compression_and_tasks(
    config: Callable[..., ReproduceConfig], mine: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in mine.read_text().splitlines()]
    other = [{"asked": row["instruction"], "said": row["response"], "team": row["category"]} for row in rows]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    named = {"data": (f"mine={tmp_path / 'other.jsonl'}",), "methods": ("mops",),
             "columns": ("instruction=asked", "response=said", "category=team")}  # fmt: skip
    assert reproduce(config(**named)) == {"cells": 2, "missing": 0}
    assert all(each["settings"]["columns"] == list(named["columns"]) for each in stored(tmp_path / "out").values())
    unseen = config(**named | {"name": "unseen", "methods": ()})
    assert plan_of(unseen, "unseen")._tasks(datas_of(unseen.data)[0]) == ["apple", "banana", "cherry"]


@pytest.mark.parametrize(("data", "said"), [
    ((), "those of the tables have columns of their own"), (("office",), "office have columns of their own"),
    (("own.jsonl", "x=superni"), "x=superni have columns of their own"),
])  # fmt: skip
def test_columns_of_data_that_come_with_the_package_are_refused_in_one_line(
    config: Callable[..., ReproduceConfig], data: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ValueError, match=rf"^--columns response=answer: {said}: give --data of yours alone, or leave"):
        reproduce(config(data=data, columns=("response=answer",)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, study in STUDIES.items() if name != "table6"])
def test_a_users_own_file_goes_through_every_name(config: Callable[..., ReproduceConfig], name: str) -> None:
    few = {"table2": ("2:4",), "table3": ("dense",), "table4": ("dense",), "table5": ("int8+2:4",), "figure6": ("2:4",)}
    settings = config(name=name, **CENTRAL | {"bases": few.get(name, ())})
    assert reproduce(settings)["missing"] == 0
    text = (settings.out / f"{name}.md").read_text()  # type: ignore[operator]
    assert "mine" in text and "not run" not in text.lower()
    for picture in re.findall(r"\((\S+)\.png\)", text):
        assert (settings.out / f"{picture}.png").stat().st_size and (settings.out / f"{picture}.svg").stat().st_size  # type: ignore[operator]


def test_settings_are_chosen_on_a_part_of_the_training_split_and_the_best_is_used(
    config: Callable[..., ReproduceConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    real = module.train
    monkeypatch.setattr(module, "train", lambda given: [seen.append(given), real(given)][1])
    settings = config(name="table2", methods=("mops",), bases=("2:4",), steps=3, tune=True)
    assert reproduce(settings)["missing"] == 0
    tries, (final,) = seen[:-1], seen[-1:]
    assert all(each.validation for each in tries) and not final.validation and "bases" in str(final.model)
    found = {r["settings"]["prompt_lr"]: r["metrics"]["perplexity"]["overall"]
             for name, r in stored(settings.out).items() if "try" in name}  # type: ignore[arg-type]  # fmt: skip
    assert len(found) == len(tries) == 4 and final.prompt_lr == min(found, key=lambda rate: found[rate])


def test_a_given_rate_is_not_tried(config: Callable[..., ReproduceConfig]) -> None:
    plan = plan_of(config(name="table2", methods=("mops",), tune=True, rates={"mops": 0.7}), "table2")
    assert plan.tries() == [] and {cell.settings["prompt_lr"] for cell in plan.cells()} == {0.7}


@pytest.mark.slow
def test_mops_over_a_lora_train_on_the_merged_weights(config: Callable[..., ReproduceConfig]) -> None:
    settings = config(name="table8", methods=("mops over lora",), bases=(), steps=3)
    plan = plan_of(settings, "table8")
    (cell,) = plan.cells()
    assert cell.over is not None and cell.key != replace(cell, over=None).key
    assert reproduce(settings)["missing"] == 0
    (merged,) = [each for each in (settings.out / "bases").iterdir() if each.is_dir()]  # type: ignore[operator]
    lora, tokenizer, _ = load_run(settings.out / "runs" / cell.over.key)  # type: ignore[operator]
    plain = AutoModelForCausalLM.from_pretrained(merged)
    tokens = tokenizer(["apple number 3."], return_tensors="pt")
    torch.testing.assert_close(plain(**tokens).logits, lora(**tokens).logits)


def test_a_second_process_waits_for_what_settings_depend_on(
    config: Callable[..., ReproduceConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl", reason="this system cannot lock files: every process computes for itself")
    reached, flock = threading.Event(), fcntl.flock

    def locks(file: Any, how: int) -> None:
        if not how & fcntl.LOCK_NB:
            reached.set()
        flock(file, how)

    settings = config(name="table2", methods=("mops",), bases=("dense",), steps=3, tune=True)
    plan = plan_of(settings, "table2")
    first = plan.tries()[0]
    with ThreadPoolExecutor() as pool, plan.grid._claim(first):
        monkeypatch.setattr(fcntl, "flock", locks)
        waiting = pool.submit(plan.grid.run, [first], wait=True)
        waiting.add_done_callback(lambda _: reached.set())
        reached.wait()
        assert not waiting.done()
        plan.grid.results.mkdir(parents=True, exist_ok=True)
        (plan.grid.results / f"{first.key}.json").write_text("{}")
    assert waiting.result() == []


def test_data_may_be_given_a_name_and_must_where_two_would_be_called_alike() -> None:
    assert datas_of(["a/b.jsonl", "mine=c/d.jsonl"]) == [Data("b", "a/b.jsonl"), Data("mine", "c/d.jsonl")]
    with pytest.raises(ConfigError, match=r"^--data a/b.jsonl and c/b.csv are both called 'b': .* other=c/b.csv$"):
        datas_of(["a/b.jsonl", "c/b.csv"])


def other(base_folder: Path, folder: Path) -> str:
    """The same base with one weight changed."""
    shutil.copytree(base_folder, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(folder)
    return str(folder)


def test_a_folder_belongs_to_one_model_limit_calibration_and_data(
    config: Callable[..., ReproduceConfig], base_folder: Path, mine: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: math.inf))  # no cell is begun
    shutil.copy(mine, tmp_path / "mine.jsonl")
    given: dict[str, Any] = {"data": (str(tmp_path / "mine.jsonl"),), "limit": 150, "budget": 1.0}
    changed = tmp_path / "more" / "mine.jsonl"
    changed.parent.mkdir()
    changed.write_text(mine.read_text().replace("aaaa", "aaa"))
    changes = {
        "model": other(base_folder, tmp_path / "other"), "limit": 0, "calibration": str(mine), "data": (str(changed),)
    }  # fmt: skip
    reproduce(config(**given | {"limit": 0}))  # nothing came of it, so the folder is not its own
    reproduce(config(**given))
    (tmp_path / "out" / "results").mkdir()
    (tmp_path / "out" / "results" / "one.json").write_text("{}")
    for name, value in changes.items():
        for only in (False, True):
            with pytest.raises(RunError, match=rf"out was begun with another {name}\b.*: choose another --out, or ask"):
                reproduce(config(**given | {name: value, "tables_only": only}))
    same = shutil.copytree(base_folder, tmp_path / "same")
    assert reproduce(config(**given | {"model": str(same)}))["missing"] == 4
    assert reproduce(config(**given | {"data": (f"else={changed}",)}))["missing"] == 4
    assert reproduce(config(**given))["missing"] == 4
    (tmp_path / "mine.jsonl").unlink()
    assert reproduce(config(**given | {"tables_only": True}))["missing"] == 4


def test_a_folder_that_noted_nothing_goes_on_unless_its_results_say_otherwise(
    config: Callable[..., ReproduceConfig], base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: math.inf))
    result = tmp_path / "out" / "results" / "old.json"
    run = tmp_path / "out" / "runs" / "old" / "config.json"
    for file, words in ((result, {"base": "dense", "settings": {"limit": 150}}), (run, {"base": str(base_folder)})):
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(words))
    with pytest.raises(RunError, match=r"another limit \(150; now 0\)"):
        reproduce(config(budget=1.0))
    with pytest.raises(RunError, match="another model"):
        reproduce(config(budget=1.0, limit=150, model=other(base_folder, tmp_path / "other")))
    assert reproduce(config(budget=1.0, limit=150))["missing"] == 4


@pytest.mark.parametrize("own", [True, False])
def test_text_that_is_too_short_for_a_later_base_is_told_before_the_first_cell(
    own: bool, config: Callable[..., ReproduceConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Grid, "run", lambda *given, **options: pytest.fail("a cell was run"))
    (text := tmp_path / "short.txt").write_text("A short text. " * 30)
    given: dict[str, Any] = {"limit": 30} if own else {"calibration": str(text)}
    with pytest.raises(ValueError, match=r"128 sequences of 32 need 4096: give more text$"):
        reproduce(config(**given))
    with pytest.raises(pytest.fail.Exception, match="a cell was run"):
        reproduce(config(bases=("dense",), **given))


def test_a_budget_ends_the_grid_and_the_next_call_goes_on(
    config: Callable[..., ReproduceConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(bases=("dense",), budget=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(module, "time", SimpleNamespace(monotonic=lambda: math.inf))
        assert reproduce(settings) == {"cells": 2, "missing": 2}
    assert "not run" in (settings.out / "table3.md").read_text() or not stored(settings.out)  # type: ignore[operator]
    assert reproduce(config(bases=("dense",)))["missing"] == 0


def test_a_cell_that_another_process_runs_is_left_to_it(config: Callable[..., ReproduceConfig]) -> None:
    settings = config(bases=("dense",), methods=("mops",))
    assert settings.out is not None
    grid = Grid(settings.out, settings.model)
    (cell,) = plan_of(settings, "table3").cells()
    with grid._claim(cell) as claimed:
        assert claimed
        assert grid.run([cell]) == [cell]
    assert grid.run([cell]) == []


def test_a_setting_that_changes_is_another_cell() -> None:
    def cell(**settings: Any) -> Cell:
        return Cell("train", Data("mine", "x.jsonl"), Base("7:8"), "mops", 1, settings)

    assert cell(steps=3).key == cell(steps=3).key
    assert cell(steps=3).key != cell(steps=4).key
    assert cell().key.startswith("mine_7-8_mops_seed1_")


@pytest.mark.parametrize(
    ("name", "settings"),
    [("dense", {}), ("75%", {"sparsity": 0.75}), ("7:8", {"pattern": "7:8"}), ("int8", {"int8": True}),
     ("int8+90%", {"int8": True, "sparsity": 0.9})],
)  # fmt: skip
def test_bases_are_named_as_in_the_paper(name: str, settings: dict[str, Any]) -> None:
    assert Base(name).compression() == settings


def test_unknown_bases_and_methods_are_named(config: Callable[..., ReproduceConfig]) -> None:
    with pytest.raises(ValueError, match="--bases tiny%: choose dense"):
        reproduce(config(bases=("tiny%",)))
    with pytest.raises(ValueError, match="--methods magic: choose from fedprompt, mops"):
        reproduce(config(methods=("magic",)))


def test_a_budget_cuts_seeds_not_columns(config: Callable[..., ReproduceConfig]) -> None:
    cells = plan_of(config(bases=("dense",), seeds=(0, 1)), "table3").cells()
    assert [(c.seed, c.method) for c in cells] == [(0, "fedprompt"), (0, "mops"), (1, "fedprompt"), (1, "mops")]


def test_the_options_know_what_the_tables_are_made_of() -> None:
    assert {name for name, study in STUDIES.items() if study.command == "federate"} == {*options.FEDERATED}
    assert {name for name, study in STUDIES.items() if study.kind == "gates"} == {*options.OF_ONE_SEED}
    assert {name for name, study in STUDIES.items() if {*study.bases} != {"dense"}} | {"all"} == {*options.COMPRESSED}
