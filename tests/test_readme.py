"""What the README shows runs as it stands, and the numbers it tells are those of the results files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def snippets(file: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), flags=re.S)


@pytest.mark.slow
def test_the_ten_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = snippets("README.md")
    assert len(code.strip().splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert (tmp_path / "runs/office/adapter/adapter_model.safetensors").exists()
    found = scope["found"]
    assert found["perplexity"]["overall"] < found["perplexity_frozen"]["overall"]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(2))
def test_what_the_page_on_python_shows_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = snippets("docs/python.md")
    assert len(found) == 2
    monkeypatch.chdir(tmp_path)
    exec(compile(found[number], "docs/python.md", "exec"), {"__name__": "shown"})
    assert list(tmp_path.rglob("adapter_model.safetensors"))


def test_the_numbers_are_those_of_the_results() -> None:
    told = re.search(r"<!-- numbers -->(.*?)<!-- /numbers -->", (ROOT / "README.md").read_text(), flags=re.S)
    assert told is not None
    first = next(iter(json.loads((ROOT / "experiments/office/results.json").read_text()).values()))
    for method in ("frozen", "ungated", "mops", "four_in_context"):
        assert f"{mean(first['per_seed'][method]):.2f}" in told[1]


def test_the_targets_of_the_quickstart_hold_in_the_results() -> None:
    """At least 40 % below the frozen model and 10 % below ungated prompts: mean of three seeds, pruned base, 40 steps."""
    found = json.loads((ROOT / "experiments/office/results.json").read_text())["magnitude 50 %, 40 steps"]
    assert len(found["seeds"]) == 3
    mops, ungated, frozen = (mean(found["per_seed"][name]) for name in ("mops", "ungated", "frozen"))
    assert mops < 0.6 * frozen and mops < 0.9 * ungated
