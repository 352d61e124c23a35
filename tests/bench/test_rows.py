"""`smartmops bench MODEL` on the embedded base, at a size that proves nothing about speed."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from smartmops.bench import rows, run
from smartmops.bench.base import BaseLab
from smartmops.bench.run import bench
from smartmops.bench.sides import BenchConfig
from smartmops.checks.errors import ConfigError, RunError
from smartmops.checks.limits import check
from smartmops.options.bench import ROWS

SMALL = dict(model="tiny", dtype="float32", repeats=1, threads=1, batches=2, batch_size=2, max_length=128, experts=3,
             prompts_per_expert=2, new_tokens=3, quality_steps=2)  # fmt: skip


def small(out: Path, **changes: Any) -> BenchConfig:
    return BenchConfig(**{"out": out, **SMALL, **changes})


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> BaseLab:
    return BaseLab(small(tmp_path_factory.mktemp("lab")))


def test_options_name_every_section() -> None:
    assert [section.name for section in rows.SECTIONS] == list(ROWS)
    assert [name for section in rows.SECTIONS for name in section.ratios] == list(rows.TARGETS)


@pytest.mark.slow
def test_rows_are_kept_and_not_measured_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    bench(small(out, only=("train", "prefill", "mixed")))
    first = json.loads((out / "metrics.json").read_text())
    assert set(first["ratios"]) == {"train_vs_lora", "train_vs_prompt_tuning", "train_vs_prefix_tuning",
                                    "prefill_vs_bare", "gate_read_share", "mixed_vs_one_task"}  # fmt: skip
    assert all(math.isfinite(value) and value > 0 for value in first["ratios"].values())
    seconds = first["raw"]["train"]["median_seconds"]
    assert first["ratios"]["train_vs_lora"] == pytest.approx(seconds["lora"] / seconds["mops"])
    assert first["raw"]["train"]["states_bytes"] > 0
    bench(small(out, only=("decode_1",), resume=True))
    second = json.loads((out / "metrics.json").read_text())
    assert second["ratios"] == first["ratios"] | {"decode_vs_bare_batch_1": second["ratios"]["decode_vs_bare_batch_1"]}
    assert second["targets"]["gate_read_share"]["value"] == 0.02
    assert second["targets"]["train_vs_prompt_tuning"]["met"] is None, "nothing was promised"


def test_other_rows_of_the_same_name_are_not_measured_beside_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "rows.jsonl"
    rows_of = [{"instruction": f"Say {i}.", "response": f"{i} {i}", "category": "say"} for i in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_of))
    monkeypatch.setattr(run, "_measured", lambda *_: {"ratios": {}, "raw": {}})
    bench(small(tmp_path / "run", data=str(data), experts=1))
    bench(small(tmp_path / "run", data=str(data), experts=1, resume=True))
    data.write_text(data.read_text().replace("Say", "Write"))
    with pytest.raises(RunError, match="started with another data set"):
        bench(small(tmp_path / "run", data=str(data), experts=1, resume=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["preparing", "quality"])
def test_what_is_paid_first_is_counted(lab: BaseLab, name: str) -> None:
    section = next(each for each in rows.SECTIONS if each.name == name)
    ratios, raw = section.measure(lab, section.ratios)
    assert set(ratios) == set(section.ratios)
    if name == "preparing":
        assert ratios["preparing_seconds"] > 0 and raw["bytes_of_states"] > 0 and raw["bytes_of_adapter"] > 0
    else:
        reached = [run["validation_nats"] <= raw["lora_validation_nats"] for run in raw["mops"]]
        assert [run["steps"] for run in raw["mops"]] == [1, 2, 4, 8, 16][: len(reached)]
        assert not any(reached[:-1]) and (reached[-1] or len(reached) == 5)  # the shortest run that gets there, or all
        seconds = raw["mops"][-1]["seconds"]
        assert ratios["quality_vs_lora"] == (raw["lora_seconds"] / seconds if reached[-1] else None)


def test_groups_are_short_middle_and_long(lab: BaseLab) -> None:
    means = [sum(lab.group(name).lengths) for name in ("short", "middle", "long")]
    assert means == sorted(means) and means[0] < means[-1]
    assert all(len(lab.group(name).rows) == len(lab.rows) for name in ("short", "middle", "long"))
    assert not {id(row) for row in lab.held_out()} & {id(row) for row in lab.rows}


def test_sides_share_weights_and_no_modules(lab: BaseLab) -> None:
    one, other = lab.base(), lab.base()
    assert one is not other and one.get_input_embeddings() is not other.get_input_embeddings()
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)


def test_states_and_padded_rows_have_one_loss(lab: BaseLab) -> None:
    """Training from states is what PEFT would compute on the padded rows."""
    side = lab.side("mops")
    side.model.eval()
    indices = range(3)
    with torch.no_grad():
        stored = side.model(**side.collate(indices)).loss
        padded = side.model(**lab._padded(indices)).loss
    assert float(stored) == pytest.approx(float(padded), rel=1e-4)


def test_the_target_follows_the_share_of_answers() -> None:
    assert rows.target_of("train_vs_lora", 0.1).value == 8
    assert rows.target_of("train_vs_lora", 0.5).value == 3
    assert rows.target_of("memory_vs_lora", 0.1).value == 0.5


@pytest.mark.parametrize(("changes", "said"), [
    ({"only": ("experts_70_vs_7",)}, "--only experts_70_vs_7 is not measured on tiny"),
    ({"only": ("decode_16",), "model": None}, "--only decode_16 is not measured on the random Llama"),
    ({"growth": True}, "--growth is measured on the random Llama"),
])  # fmt: skip
def test_what_cannot_be_measured_is_said(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check(small(tmp_path / "run", **changes))


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_where_there_is_none(tmp_path: Path) -> None:
    script = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/gpu.py"))
    assert "**Unmeasured**" in "\n".join(script["page"](tmp_path))
    script["main"](["tiny", str(tmp_path)])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["side"] for row in found["rows"]] == ["mops", "lora", "prompt_tuning", "bare"]
    assert all(each["seconds"] > 0 for row in found["rows"] for each in row["training"].values())
    page = (tmp_path / "gpu.md").read_text()
    assert "Unmeasured" not in page and "| tiny | prefill, batch 1 |" in page
