"""Options that cannot work are refused before anything is loaded, by the names a user typed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smartmops.checks.limits import check
from smartmops.data.tasks import read
from smartmops.flow.compare import CompareConfig, compare
from smartmops.flow.trainer import TrainConfig, train
from smartmops.reading import task
from smartmops.reading.early import MOST_TASKS, UNLABELLED, counted, look

Make = Callable[..., TrainConfig]


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(task, "load_base", never)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "--batch-size 0: choose 1 or more"),
        ({"steps": -5}, "--steps -5: choose 0 or more"),
        ({"warmup_steps": -1}, "--warmup-steps -1: choose 0 or more"),
        ({"warmup": 1.0}, "--warmup 1.0: choose a share of the steps from 0 to below 1"),
        ({"warmup": -0.1}, "--warmup -0.1: choose a share"),
        ({"warmup": math.nan}, "--warmup nan: choose a share"),
        ({"prompt_lr": -1.0}, "--prompt-lr -1.0: choose a finite rate of 0 or more"),
        ({"prompt_lr": math.nan}, "--prompt-lr nan: choose a finite rate"),
        ({"gate_lr": math.inf}, "--gate-lr inf: choose a finite rate"),
        ({"recovery_lr": math.nan}, "--recovery-lr nan: choose a finite rate"),
        ({"gate_pretraining_lr": -1.0}, "--gate-pretraining-lr -1.0: choose a finite rate"),
        ({"clip": 0.0}, "--clip 0.0: choose a finite number above 0"),
        ({"max_grad_norm": -1.0}, "--max-grad-norm -1.0: choose a finite number above 0"),
        ({"gate_temperature": math.nan}, "--gate-temperature nan: choose a finite number above 0"),
        ({"log_every": 0}, "--log-every 0: choose 1 or more"),
        ({"save_every": 0}, "--save-every 0: choose 1 or more"),
        ({"eval_every": 0}, "--eval-every 0: choose 1 or more"),
        ({"patience": 0, "validation_share": 0.1}, "--patience 0: choose 1 or more"),
        ({"patience": 2}, "--patience 2 waits for evaluations on validation data"),
        ({"gate_pretraining_steps": -1}, "--gate-pretraining-steps -1: choose 0 or more"),
        ({"recovery_steps": -1}, "--recovery-steps -1: choose 0 or more"),
        ({"recovery_prompts": -1}, "--recovery-prompts -1: choose 0 or more"),
        ({"max_length": 0}, "--max-length 0: choose 1 or more"),
        ({"limit": 0}, "--limit 0: choose 1 or more"),
        ({"test_share": 1.0}, "--test-share 1.0: choose a share between 0 and 1"),
        ({"test_share": math.nan}, "--test-share nan: choose a share between 0 and 1"),
        ({"validation_share": 0.6}, r"--validation-share 0.6: choose a share from 0 \(none\) to 0.5"),
        ({"validation_limit": 0}, "--validation-limit 0: choose 1 or more"),
        ({"answers_per_task": -1}, "--answers-per-task -1: choose 0 or more"),
        ({"lora_rank": 0}, "--lora-rank 0: choose 1 or more"),
        ({"activations": "memroy"}, "--activations memroy: choose auto, memory, off, or a folder such as ./memroy"),
        ({"rows": "disk"}, "--rows disk: choose memory, or a folder such as ./disk"),
        ({"injection_layer": -1}, "--injection-layer -1: choose 0 or more"),
        ({"shared_prompts": -1}, "--shared-prompts -1: choose 0 or more"),
    ],
)
def test_an_option_outside_its_limits(config: Make, nothing_loads: None, changes: dict[str, Any], message: str) -> None:
    chosen = config(**changes)
    with pytest.raises(ValueError, match=message):
        train(chosen)
    assert not chosen.out.exists(), "no run folder is left behind"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 10**6}, "--batch-size 1000000, but there are 36 training examples: choose 1 to 36"),
        (
            {"batch_size": 33, "validation_share": 0.1},
            "--batch-size 33, but there are 32 training examples: choose 1 to 32",
        ),
        ({"batch_size": 19, "hold_out": "b", "experts": 1}, "--batch-size 19, but there are 18 training examples"),
        ({"injection_layer": 40}, "--injection-layer 40, but this model has 4 layers: choose 0 to 3"),
        ({"gate_top_k": 9}, "--gate-top-k 9, but there are 2 gate weights"),
        ({"method": "top-1", "gate_granularity": "prompt"}, "--gate-granularity prompt .* one prompt alone: choose"),
        ({"visible_to": "answers", "expert_kind": "keys_values", "recovery_prompts": 2}, "choose 0 of them"),
    ],
)
def test_what_data_and_the_bases_shape_tell(
    config: Make, nothing_loads: None, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(config(**changes))


def tasks_of(file: Path, names: list[str | None]) -> str:
    rows = [{"instruction": f"x {i}", "response": "y", "category": name} for i in range(12) for name in names]
    file.write_text("".join(json.dumps({k: v for k, v in row.items() if v is not None}) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize(
    ("names", "changes", "count"),
    [
        (["a", "b", "c"], {}, 3),
        (["a", "b", "c"], {"hold_out": "c"}, 2),
        (["a", "b", "c"], {"gate_pretraining": "clusters"}, UNLABELLED),
        (["a", "b", "c"], {"gate_pretraining": "clusters", "method": "oracle"}, 3),
        (["a", "b", "c"], {"expert_names": ("a", "b", "c", "d")}, 4),
        (["a", "b", "c"], {"experts": 5}, 5),
        ([None], {}, UNLABELLED),
        ([f"t{i}" for i in range(MOST_TASKS)], {}, MOST_TASKS),
    ],
)
def test_how_many_experts_there_are_by_default(
    config: Make, tmp_path: Path, names: list[str | None], changes: dict[str, Any], count: int
) -> None:
    chosen = config(**{"data": tasks_of(tmp_path / "rows.jsonl", names), "experts": None} | changes)
    look(chosen)
    assert counted(chosen, read(chosen.data)).experts == count


@pytest.mark.parametrize(
    ("count", "changes", "message"),
    [
        (
            MOST_TASKS + 1,
            {},
            f"there are {MOST_TASKS + 1} tasks, .* {MOST_TASKS} at most: choose --experts {MOST_TASKS + 1}, or",
        ),
        (3, {"gate_top_k": 4}, "--gate-top-k 4, but there are 3 gate weights"),
        (3, {"expert_names": ("t0", "t1")}, "--expert-names t0 t1 lack category 't2'"),
    ],
)
def test_what_the_number_of_tasks_does_not_allow(
    config: Make, nothing_loads: None, tmp_path: Path, count: int, changes: dict[str, Any], message: str
) -> None:
    file = tasks_of(tmp_path / "rows.jsonl", [f"t{i}" for i in range(count)])
    with pytest.raises(ValueError, match=message):
        look(config(**{"data": file, "experts": None} | changes))
    with pytest.raises(ValueError, match=message):
        train(config(**{"data": file, "experts": None} | changes))


def test_categories_of_one_example_each_leave_none_to_test_on(
    config: Make, nothing_loads: None, tmp_path: Path
) -> None:
    file = tmp_path / "single.jsonl"
    file.write_text("".join(f'{{"instruction": "x", "response": "y", "category": "c{i}"}}\n' for i in range(3)))
    with pytest.raises(ValueError, match=r"3 training and 0 test examples.*give two or more"):
        train(config(data=str(file)))


def test_a_folder_may_be_one_that_is_there_or_that_looks_like_one(
    config: Make, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").mkdir()
    for value in ("cache", "./new", str(tmp_path / "other"), "auto", "memory", "off"):
        check(config(activations=value))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--rows file is a file: choose a folder"):
        check(config(rows="file"))


def test_compare_checks_its_own(config: Make, nothing_loads: None) -> None:
    def make(**changes: Any) -> CompareConfig:
        return CompareConfig(**dataclasses.asdict(config()) | changes)

    with pytest.raises(ValueError, match=r"--methods mops -1.0: choose a finite rate of 0 or more"):
        compare(make(methods={"mops": -1.0}))
    with pytest.raises(ValueError, match="--shots -1: choose 0 or more"):
        compare(make(shots=-1))
    with pytest.raises(ValueError, match="--batch-size 0"):
        compare(make(batch_size=0))


@pytest.mark.parametrize(("changes", "words"), [
    ({"visible_to": "answers", "expert_kind": "hidden_states"}, "needs --expert-kind keys_values"),
    ({"prefix_attention": "linear", "expert_kind": "hidden_states"}, "--prefix-attention linear needs"),
    ({"freeze_first_column": True, "prompts_per_expert": 1}, "leaves no prompt to train"),
    ({"shared_prompts": -1}, "--shared-prompts -1: choose 0 or more"),
    ({"recovery_prompts": 3, "expert_kind": "keys_values"}, "--recovery-prompts 3 are seen by every token"),
    ({"null_threshold": float("nan")}, "--null-threshold nan: choose a weight from 0"),
    ({"unrelated": Path("nowhere.txt")}, "--unrelated nowhere.txt cannot be read"),
])  # fmt: skip
def test_options_of_experts_that_cannot_act_are_refused(
    config: Callable[..., TrainConfig], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        check(config(**changes))
