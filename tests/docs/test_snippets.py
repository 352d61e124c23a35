"""Every Python snippet of every page runs as it stands, in a folder of its own; and numbers are those of results files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from shown import ROOT, Block, blocks

import smartmops as sm

SERVED = "http://127.0.0.1:8000"
SNIPPETS = [block for block in blocks() if block.language == "python"]
ASKING = [block for block in SNIPPETS if SERVED in block.text]
# Run by tests/surgery/test_experts_page.py, which has a trained run for it.
ON_A_RUN = [block for block in SNIPPETS if block.page == "docs/experts.md"]


def name(block: Block) -> str:
    """Of a test: page and place in it."""
    own = [each for each in SNIPPETS if each.page == block.page]
    return f"{Path(block.page).stem}-{own.index(block)}"


@pytest.mark.slow
@pytest.mark.parametrize("block", [each for each in SNIPPETS if each not in (*ASKING, *ON_A_RUN)], ids=name)
def test_a_snippet_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": "shown"}
    exec(compile(block.text, block.page, "exec"), scope)
    assert list(tmp_path.rglob("adapter_model.safetensors"))
    if block.page == "README.md":
        assert len(block.text.strip().splitlines()) <= 10
        assert scope["found"]["perplexity"]["overall"] < scope["found"]["perplexity_frozen"]["overall"]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of a small run."""
    pytest.importorskip("openai", reason="OpenAI's client asks the server")
    pytest.importorskip("fastapi", reason="serving is an extra")
    from served import serving
    from smartmops.serving.answering import Answerer

    out = tmp_path_factory.mktemp("served") / "run"
    sm.train(model="tiny", data="office", limit=60, steps=1, batch_size=4, samples_per_task=0, dtype="float32", out=out)
    with serving(Answerer.open(out)) as server:
        yield server.url


@pytest.mark.slow
@pytest.mark.parametrize("block", ASKING, ids=name)
def test_a_snippet_that_asks_a_server_is_answered(block: Block, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block.text.replace(SERVED, url), block.page, "exec"), {})
    printed = capsys.readouterr().out
    assert printed.startswith("['auto', 'base', 'brainstorming', ") and "left_to_base" in printed


def test_the_numbers_of_the_readme_are_those_of_the_results() -> None:
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
