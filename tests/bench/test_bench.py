"""The benchmark at a size that proves nothing about speed: every section runs, sides share their work, formulas hold."""

from __future__ import annotations

import json
import math
import os
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from smartmops.bench import ratios as command
from smartmops.bench import sides
from smartmops.bench.ratios import TARGETS
from smartmops.bench.run import bench
from smartmops.bench.sides import BenchConfig, Lab, Side, alternate, rise, step_flops

SMALL = dict(
    repeats=1, threads=1, batches=2, batch_size=2, max_length=128, layers=3, hidden=32, intermediate=48, heads=2,
    vocabulary=3072, injection_layer=1, experts=7, prompts_per_expert=2, many_experts=9, prompt_tokens=12, new_tokens=3,
    gate_examples=50, peak_sizes=(16, 32), growth_experts=(2, 4), growth_lengths=(8, 16), growth_examples=(16, 32),
)  # fmt: skip


def small(out: Path, **changes: Any) -> BenchConfig:
    return BenchConfig(**{"out": out, **SMALL, **changes})


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(small(tmp_path_factory.mktemp("lab")))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "all"
    bench(small(out, growth=True))
    return out


@pytest.mark.slow
def test_every_ratio_is_measured_and_stored(run: Path) -> None:
    stored = json.loads((run / "metrics.json").read_text())
    assert set(stored) == {"setting", "machine", "gpu", "examples", "ratios", "raw", "targets", "growth"}
    assert list(stored["ratios"]) == list(TARGETS) == list(stored["targets"])
    for name, value in stored["ratios"].items():
        assert math.isfinite(value) and value > 0, name
        assert stored["targets"][name]["met"] == TARGETS[name].met(value)
    assert stored["machine"]["threads"] == 1 and stored["machine"]["torch"] == torch.__version__
    assert set(stored["raw"]) == {section.name for section in command.SECTIONS}
    growth = stored["growth"]
    assert [point["experts"] for point in growth["experts"]] == [2, 4]
    assert [point["length"] for point in growth["length"]] == [8, 16]
    assert [point["examples"] for point in growth["data"]] == [16, 32]
    assert all(point["seconds"] > 0 for point in growth["experts"] + growth["length"])
    assert growth["data"][1]["bytes"] == 2 * growth["data"][0]["bytes"]
    assert sorted(item.name for item in run.iterdir()) == ["checkpoints", "config.json", "config.yaml", "inputs.json",
                                                           "metrics.json", "sections.json"]  # fmt: skip


@pytest.mark.slow
def test_the_ratio_is_that_of_the_medians(run: Path) -> None:
    stored = json.loads((run / "metrics.json").read_text())
    seconds, ratios = stored["raw"]["training"]["median_seconds"], stored["ratios"]
    assert ratios["train_vs_lora"] == pytest.approx(seconds["lora"] / seconds["mops"])
    first = seconds["prompt_tuning"] / (seconds["mops"] + seconds["fill"])
    assert ratios["first_epoch_vs_prompt_tuning"] == pytest.approx(first) and first < ratios["train_vs_prompt_tuning"]
    arithmetic = stored["raw"]["matrix_peak"]
    rate = sum(arithmetic["flops_per_epoch"].values()) / arithmetic["seconds_per_epoch"]
    assert ratios["matrix_peak_share"] == pytest.approx(rate / arithmetic["peak_flops_per_second"])


@pytest.mark.slow
def test_the_page_tells_what_was_measured(run: Path, tmp_path: Path) -> None:
    runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/speed.py"))["main"](run, tmp_path)
    stored = json.loads((run / "metrics.json").read_text())
    assert json.loads((tmp_path / "speed.json").read_text()) == stored
    page = (tmp_path / "speed.md").read_text()
    for name, value in stored["ratios"].items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {name} | {TARGETS[name].what}")]
        assert f"| {value:.3g} |" in line and ("**not reached**" in line) == (not stored["targets"][name]["met"])
    assert "W = 4 d^2 + 3 d m weights" in page and "![" in page
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_only_the_named_ratios_are_measured_and_settings_are_put_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    config = small(tmp_path / "run", only=("decode_vs_bare_batch_8", "prefill_vs_bare"), threads=before + 1)
    assert set(bench(config)["ratios"]) == {"prefill_vs_bare", "decode_vs_bare_batch_8"}
    assert torch.get_num_threads() == before and "ACCELERATE_USE_CPU" not in os.environ
    printed = capsys.readouterr().out
    assert "at most 1.1" in " ".join(printed.split()) and "mixed_batch" not in printed


def test_an_unknown_name_lists_the_names_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--only speed: choose train_vs_prompt_tuning, .*gate_pretraining"):
        bench(small(tmp_path / "run", only=("speed",)))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        bench(small(tmp_path))


def test_too_few_examples_are_an_error_that_says_what_to_change(tmp_path: Path) -> None:
    data = tmp_path / "few.jsonl"
    data.write_text("".join(json.dumps({"instruction": f"Say {i}.", "response": "Yes."}) + "\n" for i in range(20)))
    with pytest.raises(ValueError, match="50 batches take 100: choose fewer --batches"):
        Lab(small(tmp_path / "run", data=str(data), batches=50))


def test_every_side_trains_on_the_same_examples_in_the_same_order(lab: Lab) -> None:
    seen = {name: lab.train(lab.side(name)) for name in ("mops", "padded", "prompt_tuning", "lora")}
    orders = [steps for _, steps in seen.values()]
    assert all(order == orders[0] for order in orders)
    assert [len(step) for step in orders[0]] == [2, 2]
    assert all(seconds > 0 for seconds, _ in seen.values())


def test_cached_and_padded_sides_have_one_loss(lab: Lab) -> None:
    torch.manual_seed(0)
    mops, padded = lab.side("mops"), lab.side("padded")
    padded.model.load_state_dict(mops.model.state_dict())
    losses = [side.model(**side.collate([0, 1])).loss.item() for side in (mops, padded)]
    weights = [lab.predicted[i] for i in (0, 1)]
    assert sum(weights) > 0 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_sides_take_turns_after_one_round_for_warmth() -> None:
    calls: list[str] = []

    def call(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    found = alternate({"a": lambda: call("a"), "b": lambda: call("b")}, 2)
    assert calls == ["b", "a", "a", "b", "b", "a"], "each side is first as often as last"
    assert found == {"a": [3.0, 6.0], "b": [4.0, 5.0]}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc, which only Linux has")
def test_rise_sees_what_was_taken_and_given_back() -> None:
    def take() -> None:
        torch.ones(25_000_000)

    for _ in range(2):  # the highest mark of the first call must not stand for the second
        before, peak = rise(take) or (0, 0)
        assert 90e6 < peak - before < 130e6
    before, peak = rise(lambda: None) or (0, 0)
    assert peak - before < 10e6


def test_mixed_batch_holds_every_task_once_and_pads_on_the_left(lab: Lab) -> None:
    batch = lab.mixed()
    tasks = {example.category for example in lab.examples}
    assert len(batch["input_ids"]) == lab.config.experts == len(tasks)
    assert batch["attention_mask"][:, -1].all() and not batch["attention_mask"][:, 0].all()


@pytest.mark.parametrize("length", [3, 20])
def test_the_formula_counts_what_torch_counts(length: int, tmp_path: Path) -> None:
    """Up to what eager attention computes and masks, and the prompts' last layer, which torch runs though nobody reads it."""
    config = small(tmp_path, layers=4, injection_layer=1)
    model = _eager(Lab(config), config)
    segments, k, d = 3, config.width, config.hidden
    tokens = segments * length
    labels = torch.full((segments, length), -100)
    labels[:, -2:] = 5
    batch = {"hidden": torch.randn(tokens, d), "labels": labels.flatten(),
             "lengths": torch.full((segments,), length), "pooled": torch.randn(segments, d)}  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        model(packed=batch).loss.backward()
    wanted = step_flops(config, [length] * segments, predicted=2 * segments)

    upper, weights = 3, 4 * d * d + 3 * d * config.intermediate
    unread = 2 * k * (weights - 2 * d * d) + 4 * d * k * k  # the prompts' last layer: query, output, MLP, attention
    masked = segments * length * (length - 1) // 2  # pairs of text that causality hides
    among = config.experts * config.prompts_per_expert * (config.prompts_per_expert + 1) // 2
    hidden = 12 * d * (upper * masked + (upper - 1) * (k * k - among))
    given = 8 * d * masked  # hidden pairs whose gradient nobody needs in the first layer
    assert counter.get_total_flops() == pytest.approx(sum(wanted.values()) + unread + hidden - given, rel=0.03)


def _eager(lab: Lab, config: BenchConfig) -> Any:
    base = lab.base()
    base.config._attn_implementation = "eager"
    lab.base = lambda: base  # type: ignore[method-assign]
    return lab.adapted(lab.method("mops")).train()


def test_flops_grow_with_each_part_alone(tmp_path: Path) -> None:
    config = small(tmp_path)
    one, longer = (step_flops(config, lengths, 4) for lengths in ([5, 5], [10]))
    assert one["linear"] == longer["linear"] and one["head"] == longer["head"]
    assert one["attention"] < longer["attention"], "a token sees more of a longer segment"
    assert step_flops(config, [5, 5], 8)["head"] == 2 * one["head"]
    assert step_flops(replace(config, experts=14), [5, 5], 4)["linear"] > one["linear"]


def test_growth_takes_fewer_prompts_and_leaves_rows_out_where_memory_would_not_do(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps(*_: Any) -> dict[str, Any]:
        return {"seconds": 1.0, "peak_bytes": 1000}

    monkeypatch.setattr(command, "_steps", steps)
    monkeypatch.setattr(command, "free_memory", lambda: 2000)
    experts = command._experts_growth(lab)
    assert [point["prompts_per_expert"] for point in experts] == [2, 1]
    length = command._length_growth(lab)
    assert "seconds" in length[0] and length[1]["left_out"].startswith("about 2.4 kB of memory")


def test_a_side_that_fails_apart_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho Traceback >&2\necho MemoryError: no room >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(ValueError, match=r"training mops in a process of its own failed: .*MemoryError: no room"):
        sides.train_apart(small(tmp_path), "mops")


def test_side_is_what_train_takes(lab: Lab) -> None:
    assert isinstance(lab.side("mops"), Side) and lab.side("mops").collate is lab.cache
