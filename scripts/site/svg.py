"""Drawings as SVG text: boxes, arrows, words, and two kinds of chart. Knows no results and no files.

Colours are dark on white, and texts are sized to be read at the width they are drawn at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

INK, FAINT, TEAL, AMBER, BLUE, RED = "#23282d", "#9aa3ab", "#0b7a75", "#b3701b", "#3b6ea8", "#a8384b"
PALE = {TEAL: "#e3f3f1", AMBER: "#fbf0df", BLUE: "#e8f0f9", RED: "#f9e8eb", FAINT: "#f2f4f5", INK: "#ffffff"}
KNOWN = {"frozen": FAINT, "ungated": AMBER, "MoPs": TEAL, "LoRA": BLUE}  # methods keep their colour in every chart


class Drawing:
    """A white sheet; x to the right, y down, in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def text(self, x: float, y: float, words: str, *, size: int = 14, anchor: str = "start", colour: str = INK,
             weight: str = "normal", style: str = "normal") -> None:  # fmt: skip
        """One line; `y` is its base line."""
        self.parts.append(f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{colour}" '
                          f'font-weight="{weight}" font-style="{style}">{escape(words)}</text>')  # fmt: skip

    def box(self, x: float, y: float, width: float, height: float, words: Sequence[str] = (), *, colour: str = TEAL,
            size: int = 14, bold: bool = True, fill: str | None = None) -> None:  # fmt: skip
        """A rounded box with lines of text in its middle; with `bold`, the first of several is."""
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" '
                          f'fill="{fill or PALE[colour]}" stroke="{colour}" stroke-width="1.3"/>')  # fmt: skip
        top = y + height / 2 - (len(words) - 1) * size * 0.65 + size * 0.35
        for number, line in enumerate(words):
            self.text(x + width / 2, top + number * size * 1.3, line, size=size, anchor="middle",
                      weight="bold" if bold and number == 0 and len(words) > 1 else "normal")  # fmt: skip

    def arrow(self, *points: tuple[float, float], colour: str = INK, label: str = "", dashed: bool = False,
              head: bool = True) -> None:  # fmt: skip
        """Straight strokes through the points, with a head at the last, and words beside the first stroke."""
        path = " ".join(f"{'L' if number else 'M'}{x:g},{y:g}" for number, (x, y) in enumerate(points))
        dash = ' stroke-dasharray="4 4"' if dashed else ""
        self.parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.4"{dash}/>')
        if head:
            (x0, y0), (x1, y1) = points[-2:]
            angle = math.atan2(y1 - y0, x1 - x0)
            tips = [(x1 - 9 * math.cos(angle + turn), y1 - 9 * math.sin(angle + turn)) for turn in (0.4, -0.4)]
            corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in [(x1, y1), *tips])
            self.parts.append(f'<polygon points="{corners}" fill="{colour}"/>')
        if label:
            (x0, y0), (x1, y1) = points[:2]
            beside = (x0 + 7, (y0 + y1) / 2 + 4) if abs(x1 - x0) < 1 else (min(x0, x1) + 8, y0 - 6)
            self.text(*beside, label, size=13, colour=colour, style="italic")

    def dot(self, x: float, y: float, colour: str, radius: float = 4, filled: bool = True) -> None:
        """A point of a chart."""
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" stroke="{colour}" stroke-width="1.4" '
                          f'fill="{colour if filled else "#fff"}" fill-opacity="0.75"/>')  # fmt: skip

    def rectangle(self, x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> None:
        """A plain field of colour."""
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" '
                          f'stroke="{stroke}"/>')  # fmt: skip

    def __str__(self) -> str:
        head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
                f'height="{self.height}" font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif" role="img">')  # fmt: skip
        back = f'<rect width="{self.width}" height="{self.height}" fill="#ffffff"/>'
        return "\n".join([head, f"<title>{escape(self.title)}</title>", back, *self.parts, "</svg>"]) + "\n"


def ticks(low: float, high: float, log: bool, most: int = 6) -> list[float]:
    """Round numbers between two."""
    if log:
        found = [m * 10.0**k for k in range(-6, 9) for m in (1, 2, 5) if low <= m * 10.0**k <= high]
        return found if len(found) <= most else found[:: math.ceil(len(found) / most)]
    raw = (high - low) / most
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _figure(value: float) -> str:
    return f"{value:,.10g}"


def rows(title: str, axis: str, found: Sequence[tuple[str, Mapping[str, Sequence[float]]]], series: Sequence[str],
         *, log: bool = False, mark: float | None = None) -> Drawing:  # fmt: skip
    """A line for each row, a dot for each value, a colour for each series; `mark` is a thin upright line."""
    left, right, top, height = 210, 640, 74, 34
    values = [v for _, of in found for each in of.values() for v in each] + ([mark] if mark is not None else [])
    low, high = min(values), max(values)
    low, high = (low / 1.06, high * 1.06) if log else (low - 0.05 * (high - low), high + 0.05 * (high - low))
    drawing = Drawing(680, top + height * len(found) + 52, title)
    colours = _legend(drawing, series)

    def at(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        return left + share * (right - left)

    bottom = top + height * len(found)
    for tick in ticks(low, high, log):
        drawing.arrow((at(tick), top - 4), (at(tick), bottom), colour="#e3e7ea", head=False)
        drawing.text(at(tick), bottom + 18, _figure(tick), size=12, anchor="middle", colour="#5d666e")
    if mark is not None:
        drawing.arrow((at(mark), top - 4), (at(mark), bottom), colour=FAINT, head=False, dashed=True)
    for number, (name, of) in enumerate(found):
        y = top + height * (number + 0.5)
        drawing.text(left - 12, y + 5, name, anchor="end", size=13)
        for place, one in enumerate(series):
            for value in of.get(one, ()):
                drawing.dot(at(value), y + (place - (len(series) - 1) / 2) * 6, colours[one])
    drawing.text((left + right) / 2, bottom + 40, axis, size=13, anchor="middle")
    return drawing


def curves(
    title: str, across: str, up: str, lines: Mapping[str, Sequence[tuple[float, float]]], *, log: bool = False
) -> Drawing:
    """Values over a number; each line a series, points marked, every x that occurs labelled."""
    left, right, top, bottom = 78, 640, 82, 300
    drawing = Drawing(680, 356, title)
    colours = _legend(drawing, list(lines))
    xs = sorted({x for of in lines.values() for x, _ in of})
    ys = [y for of in lines.values() for _, y in of]
    spread = (max(ys) - min(ys)) or 1.0
    low, high = min(ys) - 0.08 * spread, max(ys) + 0.08 * spread

    def place(x: float, y: float) -> tuple[float, float]:
        share = math.log(x / xs[0]) / math.log(xs[-1] / xs[0]) if log else (x - xs[0]) / (xs[-1] - xs[0])
        return left + 14 + share * (right - left - 28), bottom - (y - low) / (high - low) * (bottom - top)

    for tick in ticks(low, high, False, 5):
        y = place(xs[0], tick)[1]
        drawing.arrow((left, y), (right, y), colour="#e3e7ea", head=False)
        drawing.text(left - 8, y + 4, _figure(round(tick, 6)), size=12, anchor="end", colour="#5d666e")
    for x in xs:
        drawing.text(place(x, low)[0], bottom + 18, _figure(x), size=12, anchor="middle", colour="#5d666e")
    for name, of in lines.items():
        colour = colours[name]
        drawing.arrow(*(place(*point) for point in of), colour=colour, head=False)
        for point in of:
            drawing.dot(*place(*point), colour)
    drawing.text((left + right) / 2, bottom + 40, across, size=13, anchor="middle")
    drawing.text(left, top - 6, up, size=12, colour="#5d666e")
    return drawing


def _legend(drawing: Drawing, series: Sequence[str]) -> dict[str, str]:
    """Title and names of the series; the colour of each."""
    drawing.text(16, 24, drawing.title, size=15, weight="bold")
    free = [colour for colour in (TEAL, AMBER, BLUE, RED) if colour not in {KNOWN.get(name) for name in series}]
    colours = {name: KNOWN.get(name) or free.pop(0) for name in series}
    x = 20.0
    for name in series:
        drawing.dot(x, 44, colours[name])
        drawing.text(x + 10, 48, name, size=13)
        x += 34 + 7.2 * len(name)
    return colours
