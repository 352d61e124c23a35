"""Positions on charts: round ticks, bars in proportion, curves inside their frame."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartmops.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MOST_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    bar_lengths,
    curves,
    running_mean,
    ticks,
)

finite = st.floats(-1e6, 1e6).map(lambda x: round(x, 3))


@given(finite, st.floats(1e-3, 1e6))
def test_ticks_enclose_the_data_and_are_round(low, span):
    high = low + span
    found = ticks(low, high)
    step = (found[-1] - found[0]) / (len(found) - 1)
    assert 2 <= len(found) <= 9
    assert found[0] <= low + step * 1e-6 and found[-1] >= high - step * 1e-6
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-3


def test_ticks_by_example():
    assert ticks(0.0, 800.0) == [0, 200, 400, 600, 800]
    assert ticks(0.27, 1.52, 5) == [0, 0.5, 1, 1.5, 2]
    assert ticks(3.0, 3.0) == [3]


def test_bars_are_in_proportion():
    assert bar_lengths([2.0, 4.0, 1.0]) == ([0.5, 1, 0.25], False)
    lengths, logarithmic = bar_lengths([1.0, 10.0, 100.0])
    assert logarithmic and lengths == pytest.approx([0, 0.5, 1])


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 10**6).map(float), finite), min_size=1, max_size=70))
def test_curves_stay_in_their_frame(points):
    (line,) = curves([(0, points)]).lines
    places = [tuple(map(float, place.split(","))) for place in f"{line[1]} {line[2]}".split()]
    assert all(LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM for x, y in places)
    assert len(line[1].split()) == len(points)


def test_curves_rise_upwards_and_run_rightwards():
    chart = curves([(3, [(20.0, 1.0), (10.0, 2.0)])])
    assert chart.lines == [(3, f"{LEFT},{TOP} {WIDTH - RIGHT},{HEIGHT - BOTTOM}", "")]
    assert chart.x_ticks[0] == (LEFT, "10") and chart.y_ticks[-1] == (TOP, "2")


def test_long_curves_are_thinned_and_smoothed():
    points = [(float(step), float(step % 2)) for step in range(5 * MOST_POINTS)]
    assert len(curves([(0, points)]).lines[0][1].split()) == MOST_POINTS
    assert all(y == 0.5 for _, y in running_mean(points)) and running_mean(points[:59]) == []
