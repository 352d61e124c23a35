"""Run folders in, one self-contained HTML page out.

Gathers plain data for the template `report.html`, which draws it. Knows run folders through `Run`, never loads a model,
and asks nothing of the network: styles and charts are inline, and the page's own policy forbids any request.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smartmops.checks.errors import ConfigError, MissingExtra, RunError
from smartmops.data.several import names_of
from smartmops.runs.folder import MEASURED, TEST_SPLIT, Run, write_text
from smartmops.settings.writing import versions
from smartmops.traits import BY_NAME

from . import charts, gates, results
from .results import Results

SAMPLES_PER_TASK = 3
COLOURS = 7  # of the template
SERIES = {"frozen": 0, "four_in_context": 1} | {name: each.series for name, each in BY_NAME.items() if each.series}
_SHOWN_ELSEWHERE = {
    "perplexity",
    "perplexity_frozen",
    "per_task",
    "per_seed",
    "seeds",
    "rounds",
    "holdings",
}  # metrics with a table or a curve of their own
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


@dataclass(frozen=True)
class Page:
    """One run as the template draws it; a part the run does not have is empty and leaves its section out."""

    label: str
    config: dict[str, Any]
    test_split: str  # fingerprint; empty where the run kept none
    results: Results
    bars: dict[str, Any] | None
    curves: list[dict[str, Any]]
    heatmaps: list[dict[str, Any]]
    samples: list[dict[str, str]]
    samples_left_out: int
    numbers: list[tuple[str, str]]
    settings: list[tuple[str, str]]

    @property
    def title(self) -> str:
        """What was done to which model, from the run's configuration."""
        base, data = (" and ".join(map(short, names_of(self.config.get(key) or ""))) for key in ("base", "data"))
        tasks = len(self.results.tasks)
        what = f"{tasks} tasks of {data}" if tasks > 1 and data else data
        return f"{base} on {what}" if base and what else self.label


def report(runs: Sequence[Path | str], out: Path | str) -> Path:
    """Write one HTML page about finished runs and return its path; several runs stand side by side.

    Args:
        runs: Run folders.
        out: The page to write; a name without `.html` is a folder that gets a `report.html`.

    Raises:
        RunNotFound: A folder is missing, is no run folder, or is unfinished.
        MissingExtra: jinja2 is not installed.
        ConfigError: No run is given, or a file of a run is broken; the message names it.
    """
    if not runs:
        raise ConfigError("a report needs at least one run: give one or more run folders")
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtra(
            "a report is laid out with jinja2, which is missing: pip install 'smartmops[report]'"
        ) from error
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "visible": visible,
        "label": results.label,
        "method": results.name,
        "percent": results.percent,
    }
    opened = [Run.open(path) for path in {Path(path).resolve(): path for path in runs}.values()]
    pages = [
        _page(run, label) for run, label in zip(opened, _labels([run.path.resolve() for run in opened]), strict=True)
    ]
    html = environment.get_template("report.html").render(
        pages=pages,
        comparison=_comparison(pages) if len(pages) > 1 else None,
        summary=results.summary,
        colour=colour,
        geometry=charts,
        version=versions()["smartmops"],
    )
    target = Path(out) if Path(out).suffix == ".html" else Path(out) / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, html)
    return target


def colour(method: str, place: int = 0) -> int:
    """Index of a method's colour: its own throughout the page, or that of its place for one unknown here."""
    return SERIES.get(method, (3 + place) % COLOURS)


def visible(text: object) -> list[str]:
    """Lines of a text, its control characters replaced by their symbols, so that all of it can be seen."""
    return _CONTROL.sub(lambda match: chr(0x2400 + min(ord(match[0]), 0x21)), str(text)).split("\n")


def short(name: str) -> str:
    """Last part of a path or hub id, without its ending."""
    return re.sub(r"\.jsonl?$", "", name.rstrip("/").rsplit("/", 1)[-1])


def _page(run: Run, label: str) -> Page:
    metrics = run.read_metrics()
    found = results.read(run.config, metrics)
    samples, left_out = _samples(run.read_samples())
    inputs = run.read_inputs()
    return Page(
        label=label,
        config=run.config,
        test_split=inputs.get(MEASURED) or inputs.get(TEST_SPLIT, ""),
        results=found,
        bars=_bars(found),
        curves=_curves(run.read_curves(), found.headline or str(run.config.get("method") or "loss")),
        heatmaps=_heatmaps(run),
        samples=samples,
        samples_left_out=left_out,
        numbers=[(k, v) for k, v in flat(metrics) if k.split(".")[0] not in _SHOWN_ELSEWHERE],
        settings=list(flat(run.config)),
    )


def flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and their values as text; lists of plain values stay on one line."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from flat(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        for place, item in enumerate(value):
            yield from flat(item, f"{key}[{place}]")
    elif isinstance(value, list):
        yield key, ", ".join(text for item in value for _, text in flat(item)) or "none"
    elif value is None or isinstance(value, bool | Mapping):
        yield key, "yes" if value is True else "no" if value is False else "none"
    else:
        yield key, f"{value:.6g}" if isinstance(value, float) else str(value)


def _bars(found: Results) -> dict[str, Any] | None:
    cells = [
        (task, m, found.per_task[m][task]) for task in found.tasks for m in found.per_task if task in found.per_task[m]
    ]
    if not cells:
        return None
    lengths, logarithmic = charts.bar_lengths([estimate.mean for _, _, estimate in cells])
    groups: dict[str, list[tuple[str, str, float]]] = {task: [] for task in found.tasks}
    for (task, method, estimate), length in zip(cells, lengths, strict=True):
        groups[task].append((method, results.figure(estimate.mean), round(length, 4)))
    return {"groups": groups, "methods": tuple(found.per_task), "logarithmic": logarithmic}


def _curves(rows: Sequence[Mapping[str, Any]], method: str) -> list[dict[str, Any]]:
    """One panel per quantity and phase, one curve per method and seed."""
    panels: dict[tuple[str, str], dict[tuple[str, Any], list[charts.Point]]] = {}
    for row in rows:
        for quantity in ("loss", "eval_perplexity"):
            if isinstance(row.get(quantity), int | float):
                panel = panels.setdefault((quantity, str(row.get("phase") or "")), {})
                line = (str(row.get("method") or method), row.get("seed"))
                panel.setdefault(line, []).append((float(row.get("step", 0)), float(row[quantity])))
    axis = "round" if any("round" in row for row in rows) else "optimiser step"
    return [_panel(quantity, phase, lines) | {"axis": axis} for (quantity, phase), lines in panels.items()]


def _panel(quantity: str, phase: str, lines: Mapping[tuple[str, Any], list[charts.Point]]) -> dict[str, Any]:
    methods = list(dict.fromkeys(method for method, _ in lines))
    drawn = charts.curves([(colour(m, methods.index(m)), points) for (m, _), points in lines.items()])
    title = {"loss": "Training loss, nats per token", "eval_perplexity": "Evaluation perplexity"}[quantity]
    return {
        "title": title + (f" ({results.label(phase)})" if phase else ""),
        "methods": methods,
        "chart": drawn,
        "smoothed": any(mean for _, _, mean in drawn.lines),
    }


def _heatmaps(run: Run) -> list[dict[str, Any]]:
    """Tables of gate weights with shades on one scale, from 0 to the largest weight of all stages."""
    try:
        stages = gates.tables(run.read_gates() or {})
    except ValueError as error:
        raise RunError(f"{run.path}: {error}") from error
    highest = max((w for table in stages.values() for row in table.weights.values() for w in row), default=0.0)
    maps = []
    for stage, table in stages.items():
        own = gates.own_weights(table)
        rows = [
            {
                "task": task,
                "cells": [(f"{w:.2f}", round(w / (highest or 1.0), 3), w == max(weights) > 0) for w in weights],
                "used": f"{gates.experts_used(weights):.1f}",
            }
            for task, weights in table.weights.items()
        ]
        maps.append(
            {
                "stage": stage,
                "experts": table.experts,
                "rows": rows,
                "highest": f"{highest:.2f}",
                "entropy": f"{gates.mean_entropy(table):.2f}",
                "own": f"{sum(own.values()) / len(own):.2f}" if own else "",
            }
        )
    return maps


def _samples(rows: Iterable[Mapping[str, Any]]) -> tuple[list[dict[str, str]], int]:
    """The first few samples of each task, in the order of the file, and how many are left out."""
    seen: dict[str, int] = {}
    kept, left_out = [], 0
    for row in rows:
        task = str(row.get("category") or "")
        seen[task] = seen.get(task, 0) + 1
        if seen[task] <= SAMPLES_PER_TASK:
            fields = ("category", "instruction", "context", "frozen", "adapted", "reference")
            kept.append({key: "" if row.get(key) is None else str(row[key]) for key in fields})
        else:
            left_out += 1
    return kept, left_out


def _labels(paths: Sequence[Path]) -> list[str]:
    """Names of different folders, with as many parents as it takes to tell them apart."""
    depth = 1
    while len(labels := {"/".join(path.parts[-depth:]): path for path in paths}) < len(paths):
        depth += 1
    return list(labels)


def _comparison(pages: Sequence[Page]) -> dict[str, Any]:
    """Headline methods of all runs side by side, and where their configurations differ."""
    shown = [page for page in pages if page.results.overall]
    merged = Results(
        {page.label: page.results.overall[page.results.headline] for page in shown},
        {page.label: page.results.per_task.get(page.results.headline, {}) for page in shown},
    )
    changes = {
        task: [page.results.change(page.results.headline, task) for page in shown] for task in (None, *merged.tasks)
    }
    settings = [dict(page.settings) for page in pages]
    keys = dict.fromkeys(key for known in settings for key in known if key != "seed")  # `seeds` holds it too
    differing = [(key, [known.get(key, "–") for known in settings]) for key in keys]
    differing = [(key, values) for key, values in differing if len(set(values)) > 1 and not key.startswith("versions.")]
    other = [key for key in ("base", "data") if len({str(page.config.get(key)) for page in pages}) > 1]
    if not other and len({page.test_split for page in pages if page.test_split}) > 1:
        other = [TEST_SPLIT]
    return {"results": merged, "pages": shown, "changes": changes, "differing": differing, "incomparable": other}
