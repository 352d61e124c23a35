"""Geometry of bars and curves: numbers in, positions out. Colours, fonts and markup belong to the page's template."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]  # step, value

WIDTH, HEIGHT = 490, 270  # of a chart of curves, in pixels
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 44  # margins that hold the axes' figures, in pixels
LOGARITHMIC_FROM = 20.0  # largest over smallest value, from which bars are drawn on a logarithmic scale
MOST_POINTS = 400  # drawn per curve: more than the pixels they would share


@dataclass(frozen=True)
class Curves:
    """A drawn chart of curves.

    Attributes:
        x_ticks: Position in pixels and text of each figure on the x axis.
        y_ticks: The same on the y axis.
        lines: Per curve the index of its colour, its points as SVG writes them, and those of its running mean (empty
            where the curve is short enough to be read as it is).
    """

    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[tuple[int, str, str]]


def bar_lengths(values: Sequence[float]) -> tuple[list[float], bool]:
    """Lengths of bars for perplexities (1 or more), as shares of the longest; and whether they are logarithmic.

    Linear bars start at 0; logarithmic ones at perplexity 1, so that their length is proportional to nats.
    """
    logarithmic = max(values) > LOGARITHMIC_FROM * min(values) and min(values) >= 1
    lengths = [math.log(v) for v in values] if logarithmic else list(values)
    return [length / max(lengths) for length in lengths], logarithmic


def curves(lines: Sequence[tuple[int, Sequence[Point]]]) -> Curves:
    """Lay out curves over optimiser steps; a line is the index of its colour and its points (some line has one)."""
    xs, ys = zip(*(point for _, points in lines for point in points), strict=True)
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys), 5)
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def right(x: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * ((x - x_low) / (x_high - x_low) if x_high > x_low else 0.5), 1)

    def down(y: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * ((y_high - y) / (y_high - y_low) if y_high > y_low else 0.5), 1)

    def drawn(points: Sequence[Point]) -> str:
        places = [f"{right(x):g},{down(y):g}" for x, y in points[:: math.ceil(len(points) / MOST_POINTS) or 1]]
        return "\n".join(" ".join(places[start : start + 10]) for start in range(0, len(places), 10))

    return Curves(
        [(right(x), f"{x:,.10g}".replace(",", "\u202f")) for x in x_ticks if x_low <= x <= x_high],
        [(down(y), f"{y:.10g}") for y in y_ticks],
        [(series, drawn(sorted(points)), drawn(running_mean(sorted(points)))) for series, points in lines],
    )


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round figures (1, 2 or 5 times a power of ten apart) from at or below `low` to at or above `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * min((m for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9)), default=10)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def running_mean(points: Sequence[Point], least: int = 60) -> list[Point]:
    """Mean over a centred window of a twentieth of the points; empty for fewer than `least` points."""
    if len(points) < least:
        return []
    window = len(points) // 20
    windows = [points[start : start + window] for start in range(len(points) - window + 1)]
    return [(sum(x for x, _ in w) / window, sum(y for _, y in w) / window) for w in windows]
