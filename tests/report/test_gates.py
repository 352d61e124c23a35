"""Gate tables: entropy, experts used, and rows that cannot be gate weights."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartmops.report.gates import entropy, experts_used, mean_entropy, own_weights, tables

GATES = {
    "experts": ["qa", "jokes"],
    "after": {"qa": [1.0, 0.0], "jokes": [0.25, 0.75]},
    "before": {"jokes": [0.5, 0.5], "qa": [0.5, 0.5]},
}
simplex = st.lists(st.floats(0, 1), min_size=1, max_size=12).filter(sum).map(lambda row: [w / sum(row) for w in row])


@given(simplex)
def test_entropy_lies_between_one_expert_and_all(row):
    assert -1e-9 <= entropy(row) <= math.log(len(row)) + 1e-9
    assert 1 - 1e-9 <= experts_used(row) <= len(row) + 1e-9
    assert entropy(row) == pytest.approx(entropy(row[::-1]), abs=1e-12)


@pytest.mark.parametrize("experts", [1, 2, 7])
def test_entropy_of_the_extremes(experts):
    assert entropy([1 / experts] * experts) == pytest.approx(math.log(experts))
    assert experts_used([1 / experts] * experts) == pytest.approx(experts)
    assert entropy([1.0] + [0.0] * (experts - 1)) == 0
    assert experts_used([0.0] * experts) == 0


def test_entropy_is_in_nats():
    assert entropy([0.25, 0.75]) == pytest.approx(0.5623351446)  # -(1/4 ln 1/4 + 3/4 ln 3/4)


def test_tables_stand_in_order_of_time_and_share_their_rows():
    before, after = tables(GATES).values()
    assert list(tables(GATES)) == ["before", "after"]
    assert before.tasks == after.tasks == ("jokes", "qa")
    assert before.experts == ("qa", "jokes")
    assert own_weights(after) == {"qa": 1.0, "jokes": 0.75}
    assert mean_entropy(before) == pytest.approx(math.log(2))


def test_own_weights_need_experts_named_after_tasks():
    (table,) = tables({"experts": ["1", "2"], "after": GATES["after"]}).values()
    assert own_weights(table) == {}
    assert tables({}) == {} and tables({"experts": ["1"], "before": {}}) == {}


def test_a_row_of_which_a_part_was_left_to_the_base_is_read() -> None:
    table = tables({"experts": ["a", "b"], "left_to_base": True,
                    "after": {"qa": [0.3, 0.1], "chat": [0.0, 0.0]}})["after"]  # fmt: skip
    assert table.weights["qa"] == (0.3, 0.1)
    assert entropy(table.weights["qa"]) == pytest.approx(entropy([0.75, 0.25])) and entropy(table.weights["chat"]) == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1.0], r"gates\.json, after\.qa has 1 weights for 2 experts"),
        ([1.2, -0.2], "outside 0 to 1"),
        ([None, 1.0], "outside 0 to 1"),
        ([0.5, 0.2], "sums to 0.7, not 1"),
        ([0.8, 0.6], "sums to 1.4, more than 1"),
    ],
)
def test_rows_that_are_no_gate_weights(row, message):
    with pytest.raises(ValueError, match=message):
        tables({"experts": ["qa", "jokes"], "after": {"qa": row}})
