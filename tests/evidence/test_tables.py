"""Means, spreads and gains of a table, and the paper's numbers beside them."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartmops.evidence import paper
from smartmops.evidence.tables import figure, frozen_of, gain, perplexities, spread, table, won


def result(method: str, seed: int, value: float, base: str = "75%") -> dict[str, Any]:
    metrics = {"perplexity": {"overall": value}, "perplexity_frozen": {"overall": 50.0}}
    return {"data": "dolly", "base": base, "method": method, "seed": seed, "metrics": metrics}


def test_a_row_holds_means_spreads_gains_and_the_papers_numbers() -> None:
    found = [
        result("fedprompt", 0, 20.0),
        result("fedprompt", 1, 22.0),
        result("mops", 0, 10.0),
        result("mops", 1, 11.0),
    ]
    (row,) = table("table3", perplexities(found), "dolly", ["75%"], "fedprompt", ["mops"], frozen_of(found)).rows
    assert row == ["75%", "50.00", "21.00 ± 1.4", "10.50 ± 0.71", "+50.0 ± 0.0 %", "11.99", "9.450", "+21.2 %"]
    assert won(perplexities(found), "fedprompt", "mops") == (2, 2)


def test_gains_are_paired_by_seed_and_seeds_of_one_side_alone_do_not_count() -> None:
    assert gain({0: 10.0, 1: 20.0, 2: 99.0}, {0: 5.0, 1: 10.0}) == "+50.0 ± 0.0 %"
    assert gain({0: 10.0}, {0: 12.0}) == "-20.0 %"
    assert gain({0: 10.0}, {1: 12.0}) == "not run"


@given(st.lists(st.floats(1.1, 1e4), min_size=2, max_size=6))
def test_a_spread_says_mean_and_deviation(values: list[float]) -> None:
    mean, deviation = spread(values).replace(",", "").split(" ± ")
    assert float(mean) == pytest.approx(statistics.mean(values), rel=2e-3, abs=0.06)
    assert float(deviation) == pytest.approx(statistics.stdev(values), rel=0.06, abs=1e-9)


def test_one_seed_and_none_are_said() -> None:
    assert spread([12.5]) == "12.50 (1 seed)" and spread([]) == "not run"
    assert [figure(v) for v in (1.26, 12.0, 141.3, 12345.0)] == ["1.260", "12.00", "141.3", "12,345"]


def test_the_papers_numbers_are_those_of_the_notes(shared_data: Path) -> None:
    notes = json.loads((shared_data.parent / "notes" / "paper_tables.json").read_text())
    order = ["unstructured 90%", "unstructured 85%", "unstructured 75%", "7:8", "3:4", "2:4", "4:8"]
    assert notes["order"] == order and [name.removeprefix("unstructured ") for name in order] == list(paper.BASES)
    for data in ("dolly", "superni"):
        assert list(paper.TABLE2[data]["prompt-tuning"]) == notes["table2_centralized"][data]["baseline"]
        assert list(paper.TABLE2[data]["mops"]) == notes["table2_centralized"][data]["mops"]
        assert list(paper.TABLE3[data]["fedprompt"]) == notes["table3_federated_100_clients"][data]["fedprompt"]
        assert list(paper.TABLE3[data]["mops"]) == notes["table3_federated_100_clients"][data]["mops"]
    five = notes["table5_int8_federated_10_clients_dolly"]
    assert {name: list(row) for name, row in paper.TABLE5["dolly"].items()} == five
    for table_, name in (("table4", "table4_peft"), ("table6", "table6_int8_centralized")):
        rows = {
            ("dense" if base == "uncompressed" else base): row for base, row in notes[name].items() if base != "columns"
        }
        ours = {base: [paper.printed(table_, "dolly", method, base) for method in paper.METHODS] for base in rows}
        assert ours == rows
    assert list(paper.TABLE8.values()) == list(notes["table8_phi2"].values())
    assert paper.printed("table5", "dolly", "mops", "int8+75%") == 28.26
    assert (
        paper.printed("table3", "mine", "mops", "75%") is None
        and paper.printed("table3", "dolly", "mops", "dense") is None
    )
