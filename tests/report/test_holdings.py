"""The picture of who holds what: every count in its place, any number of clients, strange names, the same bytes twice."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartmops.report.holdings import CATEGORIES, COLOURS, GREY, NAMED, holdings_figure, save_holdings

pytest.importorskip("matplotlib", reason="pictures: pip install 'smartmops[report]'")

TABLE = {"small": [0, 2, 1], "large": [7, 0, 30]}
NAMES = ["ann", "bob", "eve"]


def drawn(figure: Any) -> tuple[list[str], list[list[int]]]:
    """Labels of the rows and, row by row, the counts whose shades are drawn."""
    below = figure.axes[1]
    return [label.get_text() for label in below.get_yticklabels()], below.images[0].get_array().data.tolist()


def bars(figure: Any, row: int) -> list[tuple[float, float]]:
    """Foot and top of each client's bar of a row."""
    above = figure.axes[0]
    if above.containers:
        return [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in above.containers[row]]
    steps = above.patches[row].get_data()
    return list(zip(steps.baseline, steps.values, strict=True))


def test_clients_and_categories_stand_largest_first() -> None:
    figure = holdings_figure(TABLE, NAMES)
    assert drawn(figure) == (["large", "small"], [[30, 7, 0], [1, 0, 2]])
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["eve", "ann", "bob"]
    assert bars(figure, 0) == [(0, 30), (0, 7), (0, 0)] and bars(figure, 1) == [(30, 31), (7, 7), (0, 2)]
    assert figure.axes[0].get_ylabel() == "examples"
    assert figure.get_suptitle() == "40 examples. A client holds 2 to 31, the median 7"


def test_row_labels_carry_the_colour_of_the_bars() -> None:
    figure = holdings_figure({f"c{n:02}": [20 - n, 1] for n in range(10)}, ["a", "b"])
    beside = [swatch.get_facecolor() for swatch in figure.axes[1].patches]
    assert beside == [container[0].get_facecolor() for container in figure.axes[0].containers]
    assert len(set(beside)) == len(COLOURS) + 1 and beside[7:] == [beside[-1]] * 3
    assert len({*COLOURS, GREY}) == 8


@settings(max_examples=15)
@given(st.data())
def test_every_example_is_drawn(data: st.DataObject) -> None:
    clients = data.draw(st.integers(1, 120))
    counts = st.lists(st.integers(0, 10**6), min_size=clients, max_size=clients)
    table = data.draw(st.dictionaries(st.text(max_size=8), counts, min_size=1, max_size=CATEGORIES))
    if not any(map(any, table.values())):
        return
    figure = holdings_figure(table, [f"client {n}" for n in range(clients)])
    labels, shades = drawn(figure)
    assert sorted(map(sorted, shades)) == sorted(map(sorted, table.values())) and len(labels) == len(table)
    totals = [sum(column) for column in zip(*shades, strict=True)]
    assert totals == sorted(totals, reverse=True)
    for row, counts_of_row in enumerate(shades):
        assert [top - foot for foot, top in bars(figure, row)] == counts_of_row
    assert [top for _, top in bars(figure, len(table) - 1)] == totals


@pytest.mark.parametrize(("clients", "named"), [(1, True), (2, True), (NAMED, True), (NAMED + 1, False), (1000, False)])
def test_few_clients_are_named_and_many_are_counted(clients: int, named: bool, tmp_path: Path) -> None:
    names = [f"client {n}" for n in range(clients)]
    table = {"a": [n % 7 for n in range(1, clients + 1)], "b": [3] * clients}
    figure = holdings_figure(table, names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that the layout does not fit would be a warning
        figure.savefig(tmp_path / "all.png")
    shown = {label.get_text() for label in figure.axes[1].get_xticklabels() if label.get_visible()}
    assert (set(names) <= shown) == named
    assert figure.axes[1].get_xlabel().startswith("1 client" if clients == 1 else f"{clients:,} clients, those")
    left, right = figure.axes[1].get_xlim()
    assert (left, right) == (-0.5, clients - 0.5)


def test_beyond_thirty_categories_the_smallest_share_a_row() -> None:
    table = {f"c{n}": [n + 1, 1] for n in range(100)}
    labels, shades = drawn(holdings_figure(table, ["a", "b"]))
    assert len(labels) == CATEGORIES and labels[0] == "c99" and labels[-1] == "71 others"
    assert shades[-1] == [sum(range(1, 72)), 71]
    assert sum(map(sum, shades)) == sum(map(sum, table.values()))


def test_strange_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    table = {"_$x_{$": [1, 2], "": [3, 4], "long " * 30: [5, 6]}
    figure = holdings_figure(table, ["$\\frac$", "b" * 300])
    figure.savefig(tmp_path / "a.svg")
    labels, _ = drawn(figure)
    assert labels[1:] == ["(no category)", "_$x_{$"] and len(labels[0]) == 40 and labels[0].endswith("…")
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["b" * 39 + "…", "$\\frac$"]


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml")])
def test_a_picture_is_the_same_bytes_each_time(tmp_path: Path, name: str, start: bytes) -> None:
    files = [tmp_path / folder / name for folder in ("one", "two")]
    for file in files:
        file.parent.mkdir()
        save_holdings(TABLE, NAMES, file)
    assert files[0].read_bytes() == files[1].read_bytes() and files[0].read_bytes().startswith(start)


def test_what_cannot_be_drawn_is_named(tmp_path: Path) -> None:
    for table, names, message in [
        ({}, ["a"], "1 clients and 0 categories to draw: give one of each at least"),
        ({"a": [1]}, ["a", "b"], "category 'a' has 1 counts, but there are 2 clients: give one each"),
        ({"a": [1, -1]}, ["a", "b"], "category 'a' has a count of -1: give 0 or more"),
        ({"a": [0, 0]}, ["a", "b"], "0 examples to draw: give one at least"),
    ]:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            holdings_figure(table, names)
    with pytest.raises(ValueError, match=r"a\.pdf' ends in '\.pdf': choose a file ending in \.png or \.svg"):
        save_holdings(TABLE, NAMES, tmp_path / "a.pdf")
    with pytest.raises(FileNotFoundError):
        save_holdings(TABLE, NAMES, tmp_path / "missing" / "a.png")


def test_without_matplotlib_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"which is missing: pip install 'smartmops\[report\]'"):
        save_holdings(TABLE, NAMES, tmp_path / "a.png")
