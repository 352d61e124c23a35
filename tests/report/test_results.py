"""Metrics into tables and sentences: both shapes, spreads, honest signs."""

from __future__ import annotations

import pytest

from smartmops.report.results import Estimate, Results, figure, label, name, percent, read, summary

QUICKSTART = {
    "perplexity": {"mops": 1.29, "frozen": 3.4, "four_in_context": 1.35, "ungated": 2.82},
    "per_task": {
        "frozen": {"closed_qa": 4.0, "jokes": 3.0},
        "mops": {"closed_qa": 1.0, "jokes": 3.001},
        "four_in_context": {"closed_qa": 2.0},
    },
    "per_seed": {"mops": [1.28, 1.29, 1.30], "frozen": [3.4, 3.4, 3.4]},
    "seeds": [0, 1, 2],
}
TRAIN = {"perplexity": {"overall": 28.3, "per_task": {"closed_qa": 20.0, "open_qa": 40.0}}}


def plain(text):
    return text.replace("\u00a0", " ").replace("\u202f", " ")


def test_several_methods():
    found = read({"method": "mops"}, QUICKSTART)
    assert found.methods == ("frozen", "four_in_context", "ungated", "mops")
    assert found.tasks == ("closed_qa", "jokes") and found.headline == "mops" and found.seeds == 3
    assert found.overall["mops"].spread == pytest.approx(0.01) and plain(str(found.overall["mops"])) == "1.29 ± 0.01"
    assert found.overall["ungated"].spread is None and str(found.overall["ungated"]) == "2.82"
    assert found.change("mops", "closed_qa") == -75 and found.change("frozen") is None
    assert found.change("four_in_context", "jokes") is None
    assert found.lowest("closed_qa") == {"mops"} and found.lowest() == {"mops"}
    assert found.lowest("jokes") == {"frozen", "mops"}  # equal as printed
    assert plain(summary(found)) == (
        "MoPs lowers the frozen model’s perplexity from 3.40 ± 0.00 to 1.29 ± 0.01 (−62 %). For comparison: four "
        "examples in context 1.35, ungated prompts 2.82. MoPs has the lowest perplexity on 1 of 2 tasks."
    )


def test_one_method():
    found = read({"method": "prompt-tuning"}, TRAIN)
    assert found.methods == ("prompt-tuning",) and found.lowest() == set() and found.change("prompt-tuning") is None
    assert summary(found) == (
        "Prompt tuning reaches a perplexity of 28.3. The lowest task is closed QA (20.0), the highest open QA (40.0)."
    )
    beside = read({"method": "mops"}, TRAIN | {"perplexity_frozen": {"overall": 20.0, "per_task": {"open_qa": 50.0}}})
    assert beside.methods == ("frozen", "mops") and beside.change("mops", "open_qa") == pytest.approx(-20)
    assert "MoPs raises the frozen model’s perplexity from 20.0 to 28.3 (+42 %)." in plain(summary(beside))
    assert read({}, {"perplexity": {"overall": 2.0}}).methods == ("adapted",)


def test_no_change_is_no_improvement():
    found = read({}, {"perplexity": {"frozen": 2.0, "mops": 1.999}})
    assert summary(found) == "MoPs leaves the frozen model’s perplexity at 2.00."


def test_lists_per_seed_and_missing_numbers():
    found = read(
        {}, {"perplexity": {"frozen": [2.0, 4.0], "mops": None, "note": "x"}, "per_task": {"frozen": {"a": [1, 3]}}}
    )
    assert found.overall == {"frozen": Estimate(3.0, 2**0.5)} and found.headline == "frozen"
    assert found.per_task["frozen"]["a"].mean == 2
    assert read({}, {}) == Results({}) and summary(Results({})) == ""
    assert summary(found) == f"Frozen reaches a perplexity of {found.overall['frozen']}."


@pytest.mark.parametrize(
    ("value", "text"), [(1.2849, "1.28"), (9.996, "10.0"), (145.84, "145.8"), (999.9, "1 000"), (12345.6, "12 346")]
)
def test_figures(value, text):
    assert plain(figure(value)) == text


@pytest.mark.parametrize(
    ("value", "text"), [(-62.06, "−62 %"), (-1.44, "−1.4 %"), (12.3, "+12 %"), (0.01, "0.0 %"), (-9.97, "−10 %")]
)
def test_percentages(value, text):
    assert plain(percent(value)) == text


def test_names():
    assert name("mops") == "MoPs" and name("my_method") == "my method"
    assert label("closed_qa") == "closed QA" and label("quality") == "quality"
