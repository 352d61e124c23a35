"""A picture of who holds what: how many examples each client has, and of which categories.

Knows counts and names. Knows no examples and nothing of how they were shared out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from smartmops.checks.errors import ConfigError, MissingExtra

SUFFIXES = (".png", ".svg")
# Okabe and Ito's colours, which the colour-blind tell apart; they go to the largest categories, grey to all others.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
GREY, INK, SOFT = "#a3a9b0", "#1c2127", "#626a73"
SHADES = ("#d6dade", "#9aa3ad", "#4a5560", "#05080c")  # for 1 to most examples; hueless, since hues mean categories
CATEGORIES = 30  # with a row of their own
NAMED = 40  # clients at most whose names fit below the columns
LONGEST = 40  # characters of a name


def holdings_figure(table: Mapping[str, Sequence[int]], names: Sequence[str]) -> Any:
    """A `matplotlib.figure.Figure` with one column a client, sorted by its number of examples.

    Above, bars of all its examples, coloured by category. Below, its examples of each category as shades on a
    logarithmic scale, which shows small holdings beside large ones; none at all is left white. The labels of the rows
    are the legend of both. Beyond 30 categories, the smallest share a row.

    Args:
        table: Per category, the number of examples that each client holds, as `Partition.table` gives it.
        names: Of the clients.

    Raises:
        MissingExtra: matplotlib is not installed.
        RunError: There is no client, no category or no example, or a row is not one count of 0 or more a client.
    """
    _check(table, names)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra(
            "who holds what is drawn with matplotlib, which is missing: pip install 'smartmops[report]'"
        ) from error
    order = sorted(range(len(names)), key=lambda client: -sum(row[client] for row in table.values()))
    rows = _folded({category: [counts[client] for client in order] for category, counts in table.items()})
    colours = [*COLOURS, *[GREY] * len(rows)][: len(rows)]

    figure = Figure(figsize=(11, 3.6 + 0.26 * len(rows)), layout="constrained", dpi=160)
    grid = figure.add_gridspec(2, 2, height_ratios=(2.6, 0.26 * len(rows)), width_ratios=(1, 0.012))
    above = figure.add_subplot(grid[0, 0])
    below = figure.add_subplot(grid[1, 0], sharex=above)
    _bars(above, rows, colours)
    shades = _shades(below, rows, colours)
    _clients(below, [names[client] for client in order])
    figure.colorbar(shades, cax=figure.add_subplot(grid[1, 1]), format="{x:,.0f}", label="examples")
    figure.suptitle(_title(rows), x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def save_holdings(table: Mapping[str, Sequence[int]], names: Sequence[str], path: str | Path) -> None:
    """Draw `holdings_figure` into a PNG or SVG file; the same table gives the same bytes.

    Raises:
        MissingExtra: matplotlib is not installed.
        DiskError: The file cannot be written.
        ConfigError: As `holdings_figure`, or the file ends neither in .png nor in .svg.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"picture={str(path)!r} ends in {path.suffix!r}: choose a file ending in .png or .svg")
    figure = holdings_figure(table, names)
    from matplotlib import rc_context

    # Without the salt, the ids within an SVG file would differ each time.
    with rc_context({"svg.hashsalt": "smartmops"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def _folded(rows: dict[str, list[int]]) -> dict[str, list[int]]:
    """Rows with the largest category first, the smallest summed up into one where there are too many; shown names."""
    largest = sorted(rows, key=lambda category: -sum(rows[category]))
    apart = largest if len(largest) <= CATEGORIES else largest[: CATEGORIES - 1]
    folded = {category: rows[category] for category in apart}
    if others := [rows[category] for category in largest[len(apart) :]]:
        folded[f"{len(others)} others"] = [sum(counts) for counts in zip(*others, strict=True)]
    return folded


def _bars(axes: Any, rows: Mapping[str, Sequence[int]], colours: Sequence[str]) -> None:
    clients = len(next(iter(rows.values())))
    base = [0] * clients
    for counts, colour in zip(rows.values(), colours, strict=True):
        tops = [low + count for low, count in zip(base, counts, strict=True)]
        if clients <= NAMED:
            axes.bar(range(clients), counts, 0.8, base, color=colour)
        else:
            # One outline a category: a thousand bars side by side would leave hairlines between them.
            edges = [client - 0.5 for client in range(clients + 1)]
            axes.stairs(tops, edges, baseline=base, fill=True, color=colour, linewidth=0)
        base = tops
    axes.set_ylabel("examples", color=INK)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_locator(_whole_numbers())
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines["left"].set_position(("outward", 4))  # points; of 1,000 clients, the first would lie beneath it
    axes.tick_params(axis="x", bottom=False, labelbottom=False)


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=6, integer=True)


def _shades(axes: Any, rows: Mapping[str, Sequence[int]], colours: Sequence[str]) -> Any:
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.patches import Rectangle

    most = max(max(counts) for counts in rows.values())
    scale = LogNorm(1, max(2, most))  # masks zeros, which so stay white
    greys = LinearSegmentedColormap.from_list("holdings", SHADES)
    image = axes.imshow(list(rows.values()), greys, scale, aspect="auto", interpolation="nearest")
    labels = [_short(category or "(no category)") for category in rows]
    axes.set_yticks(range(len(rows)), labels, color=INK, parse_math=False)
    beside = axes.get_yaxis_transform()  # x as a share of the width, y as the number of the row
    for row, colour in enumerate(colours):
        swatch = Rectangle((-0.016, row - 0.32), 0.010, 0.64, transform=beside, color=colour, clip_on=False)
        axes.add_patch(swatch)
    axes.tick_params(axis="y", left=False, pad=16)
    axes.spines[:].set_color(GREY)
    return image


def _clients(axes: Any, names: Sequence[str]) -> None:
    """The x axis: names where they fit, else their number alone."""
    if len(names) > NAMED:
        axes.tick_params(axis="x", bottom=False, labelbottom=False)
    else:
        shown = [_short(name) for name in names]
        upright = len(shown) * (max(map(len, shown)) + 1) > 115  # characters that fit below the columns
        axes.set_xticks(range(len(names)), shown, color=INK, parse_math=False, rotation=90 if upright else 0)
        axes.tick_params(axis="x", bottom=False)
    count = "1 client" if len(names) == 1 else f"{len(names):,} clients, those with most examples first"
    axes.set_xlabel(count, color=SOFT)


def _title(rows: Mapping[str, Sequence[int]]) -> str:
    held = [sum(counts) for counts in zip(*rows.values(), strict=True)]
    return f"{sum(held):,} examples. A client holds {min(held):,} to {max(held):,}, the median {median(held):,.10g}"


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def _check(table: Mapping[str, Sequence[int]], names: Sequence[str]) -> None:
    if not names or not table:
        raise ValueError(f"{len(names)} clients and {len(table)} categories to draw: give one of each at least")
    for category, counts in table.items():
        if len(counts) != len(names):
            raise ValueError(
                f"category {category!r} has {len(counts)} counts, but there are {len(names)} clients: give one each"
            )
        if min(counts) < 0:
            raise ValueError(f"category {category!r} has a count of {min(counts)}: give 0 or more")
    if not any(map(any, table.values())):
        raise ValueError("0 examples to draw: give one at least")
