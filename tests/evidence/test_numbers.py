"""Every number a reader sees in the committed report is worked out again from the results files, without our code."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from smartmops.evidence import paper
from smartmops.federated.federate import FederateConfig
from smartmops.flow.trainer import TrainConfig

EVIDENCE = Path(__file__).resolve().parents[2] / "experiments" / "evidence"
NUMERAL = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
# A mean with its deviation is one number: both must be of the same runs. A sign counts where a number may begin.
NUMBER = re.compile(rf"(?:(?<![\w.,)%])[+-])?{NUMERAL}(?: ± {NUMERAL})?")
INLINE = {"wbr", "code", "span", "a", "b", "strong", "em", "i", "small", "sup", "sub"}  # do not end a word
CONFIGS: dict[str, Any] = {"train": TrainConfig, "federate": FederateConfig}
UNSHOWN = {"rounds", "holdings"}  # metrics that stand in no table

Result = dict[str, Any]
Runs = dict[int, Result]  # by seed


class Visible(HTMLParser):
    """The text a reader sees; the cells of heatmaps apart from it, in rows."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text = ""
        self.rows: list[list[str]] = []
        self.hidden = self.heat = self.cell = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._between(tag, opening=True)
        if tag == "table":
            self.heat = dict(attrs).get("class") == "heat"
        if self.heat and tag == "tr":
            self.rows.append([])
        if self.heat and tag in ("td", "th"):
            self.cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._between(tag, opening=False)
        if tag in ("td", "th"):
            self.cell = False

    def _between(self, tag: str, opening: bool) -> None:
        if tag not in INLINE:
            self.text += " "
        if tag in ("style", "script"):
            self.hidden = opening

    def handle_data(self, data: str) -> None:
        if self.cell:
            self.rows[-1][-1] += data.strip()
        elif not self.hidden:
            self.text += data


def numbers(html_text: str) -> list[str]:
    """All numbers of the text a reader sees, heatmaps left out, without separators of thousands."""
    text = re.sub(r"\s+", " ", Visible(html_text).text).replace("−", "-")
    return NUMBER.findall(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text))


def heatmap_rows(html_text: str) -> list[tuple[str, ...]]:
    """Rows of all heatmaps: a name and its weights; heads, whose first cell is empty, are left out."""
    return [tuple(row) for row in Visible(html_text).rows if row[0]]


def allowed(results: Sequence[Result]) -> set[str]:
    """Every number that follows from the results, as a report may print it."""
    sources: list[Callable[[Sequence[Result]], Iterator[str]]] = [
        names, settings, counts, means, frozen, gains, skew, papers,
    ]  # fmt: skip
    return {number for source in sources for number in source(results)}


def names(results: Sequence[Result]) -> Iterator[str]:
    """Numerals within names: 75% and 7:8, `try 2`, `task001`, `expert 6`."""
    for each in results:
        tasks = each["metrics"]["perplexity"]["per_task"]
        experts = (each.get("gates") or {}).get("experts", ())
        for name in (each["data"], each["base"], each["method"], *tasks, *experts):
            yield from NUMBER.findall(str(name))


def settings(results: Sequence[Result]) -> Iterator[str]:
    for each in results:
        for _, value in scalars(each["settings"]):
            yield f"{value:g}" if isinstance(value, float) else str(value)
        yield str(each["seed"])


def counts(results: Sequence[Result]) -> Iterator[str]:
    """What is counted in words: cells, pairs, seeds; tasks, tokens and answers, each and their sums."""
    yield from map(str, range(len(results) + 1))
    for each in results:
        for found in (each["metrics"]["tokens"], each["metrics"].get("answers", {}).get("count", {})):
            yield from map(str, (*found.values(), sum(found.values())))
        yield from (str(value) for _, value in scalars(each["metrics"]) if isinstance(value, int))


def means(results: Sequence[Result]) -> Iterator[str]:
    """Each metric over the seeds of a line, as a perplexity, as a share, in percent and with two decimals."""
    for runs in groups(results).values():
        found: dict[tuple[str, ...], list[float]] = {}
        for each in runs.values():
            for path, value in scalars(each["metrics"]):
                found.setdefault(path, []).append(value)
        for path, values in found.items():
            if path[0].startswith("perplexity"):
                yield spread(values, significant, ".2g")
            elif isinstance(values[0], float):
                yield from (spread(values, form, form) for form in (".2f", ".3f"))
                yield spread([100 * value for value in values], ".1f", ".1f")


def frozen(results: Sequence[Result]) -> Iterator[str]:
    for each in results:
        yield from (significant(value) for _, value in scalars(each["metrics"].get("perplexity_frozen", {})))
        answers = each["metrics"].get("answers", {}).get("frozen", {})
        yield from (f"{value:.3f}" for _, value in scalars(answers))


def gains(results: Sequence[Result]) -> Iterator[str]:
    """Of every line over every other on the same data and base, and over the frozen base, paired by seed."""
    lines = list(groups(results).items())
    for (data, base, *_), own in lines:
        for task in tasks_compared(own):
            yield spread(list(gain(own, own, task, "perplexity_frozen").values()), "+.1f", ".1f")
            for (their_data, their_base, *_), other in lines:
                if (data, base) == (their_data, their_base) and task in tasks_compared(other):
                    yield spread(list(gain(other, own, task).values()), "+.1f", ".1f")


def skew(results: Sequence[Result]) -> Iterator[str]:
    """How much more gating gains in a federation than in the centre, in points."""
    found: dict[tuple[str, str, str], list[dict[int, float]]] = {}
    lines = list(groups(results).items())
    for command, baseline in (("train", "prompt-tuning"), ("federate", "fedprompt")):
        for (data, base, method, its, _), own in lines:
            for (their_data, their_base, their_method, theirs, _), other in lines:
                same = (data, base, command, command) == (their_data, their_base, its, theirs)
                if same and method.startswith("mops") and their_method == baseline:
                    found.setdefault((data, base, command), []).append(gain(other, own))
    for (data, base, command), outside in found.items():
        for inside in found.get((data, base, "train"), []) if command == "federate" else []:
            for there in outside:
                points = [there[seed] - inside[seed] for seed in there.keys() & inside.keys()]
                yield spread(points, "+.1f", ".1f")


def papers(results: Sequence[Result]) -> Iterator[str]:
    """The paper's own numbers, and its gains as ours are counted."""
    for table in (paper.TABLE2, paper.TABLE3, paper.TABLE5):
        for by_method in table.values():
            baseline, mops = by_method.values()
            yield from map(significant, (*baseline, *mops))
            yield from (f"{100 * (1 - own / first):+.1f}" for first, own in zip(baseline, mops, strict=True))
    for row in (*paper.TABLE4.values(), *paper.TABLE6.values()):
        yield from map(significant, row)
        yield f"{100 * (1 - row[1] / row[0]):+.1f}"
    yield from map(significant, paper.TABLE8.values())
    yield from map(str, range(12))  # its tables and figures


def groups(results: Sequence[Result]) -> dict[tuple[str, ...], Runs]:
    """Runs that differ in their seed alone."""
    found: dict[tuple[str, ...], Runs] = {}
    for each in results:
        # A result older than a setting was made as that setting's default makes it.
        defaults = {f.name: f.default for f in fields(CONFIGS[each["command"]]) if f.default is not MISSING}
        key = (
            *(each[name] for name in ("data", "base", "method", "command")),
            json.dumps(defaults | each["settings"], sort_keys=True, default=str),
        )
        found.setdefault(key, {})[each["seed"]] = each
    return found


def tasks_compared(runs: Runs) -> set[str | None]:
    """None for all response tokens, and the task that was held out."""
    return {None, *(each["settings"].get("hold_out") for each in runs.values())}


def gain(first: Runs, own: Runs, task: str | None = None, key: str = "perplexity") -> dict[int, float]:
    """Reduction of the first one's perplexity in percent, by seed."""

    def at(each: Result, key: str) -> float:
        return each["metrics"][key]["overall"] if task is None else each["metrics"][key]["per_task"][task]

    return {seed: 100 * (1 - at(own[seed], "perplexity") / at(first[seed], key)) for seed in own.keys() & first.keys()}


def scalars(found: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """Numbers among nested values, each with where it stands."""
    if isinstance(found, Mapping):
        for name, value in found.items():
            if path or name not in UNSHOWN:
                yield from scalars(value, (*path, str(name)))
    elif isinstance(found, int | float) and not isinstance(found, bool):
        yield path, found


def spread(values: Sequence[float], form: str | Callable[[float], str], deviation: str) -> str:
    """Mean and sample standard deviation; of one value, itself; of none, nothing."""
    if not values:
        return ""
    mean = statistics.mean(values)
    words = form(mean) if callable(form) else f"{mean:{form}}"
    return words + (f" ± {statistics.stdev(values):{deviation}}" if len(values) > 1 else "")


def significant(value: float) -> str:
    """Four digits, and no fewer than one decimal below 1,000."""
    exponent = int(f"{value:e}".partition("e")[2])
    return f"{value:.{max(1, 3 - exponent)}f}" if 0 < value < 1000 else f"{value:.0f}"


def offenders(html_text: str, results: Sequence[Result]) -> list[str]:
    """Numbers of a report that do not follow from the results, heatmaps' rows included."""
    known = allowed(results)
    weights = {
        (task, *(f"{weight:.2f}" for weight in row))
        for each in results for stage in ("before", "during", "after")
        for task, row in ((each.get("gates") or {}).get(stage) or {}).items()
    }  # fmt: skip
    wrong = [number for number in dict.fromkeys(numbers(html_text)) if number not in known]
    return wrong + [" ".join(row) for row in heatmap_rows(html_text) if row not in weights]


def test_every_number_of_the_committed_report_is_in_a_results_file() -> None:
    report = EVIDENCE / "report.html"
    if not report.is_file():
        pytest.skip(f"no report: {report} is not written yet")
    results = [json.loads(file.read_text()) for file in sorted((EVIDENCE / "results").glob("*.json"))]
    assert (wrong := offenders(report.read_text(encoding="utf-8"), results)) == [], f"follow from no result: {wrong}"


def made() -> list[Result]:
    """Two methods over three seeds."""
    values = {"prompt-tuning": (20.0, 22.0, 24.0), "mops": (10.0, 11.0, 18.0)}
    return [
        {"command": "train", "data": "dolly", "base": "75%", "method": method, "seed": seed,
         "metrics": {"perplexity": {"overall": value, "per_task": {"task001_qa": value}}, "tokens": {"task001_qa": 1234},
                     "perplexity_frozen": {"overall": 1530.2, "per_task": {"task001_qa": 50.0}}},
         "gates": {"experts": ["a", "b"], "after": {"task001_qa": [0.256, 0.744]}}, "settings": {"prompt_lr": 0.3}}
        for method, by_seed in values.items() for seed, value in enumerate(by_seed)
    ]  # fmt: skip


GOOD = """<html><head><style>p { margin: 77px; }</style></head><body>
<p>task<wbr>001_<wbr>qa: 1,234 tokens at <code>0.3</code>, seed 0.</p>
<table class="figures"><tr><th>75%</th><td>1,530</td><td>22.00 ± 2</td><td>13.00 ± 4.4</td><td>+41.7 ± 14.4 %</td>
<td>paper: 8.250, 7.240, +12.2 %</td></tr></table>
<table class="heat"><tr><td></td></tr></table><table class="heat"><caption>After 3</caption><tr><td></td><th>a</th><th>b</th></tr>
<tr><th>task<wbr>001_<wbr>qa</th><td>0.26</td><td>0.74</td></tr></table></body></html>"""


def test_numbers_are_those_a_reader_sees() -> None:
    assert numbers(GOOD) == ["001", "1234", "0.3", "0", "75", "1530", "22.00 ± 2", "13.00 ± 4.4", "+41.7 ± 14.4",
                             "8.250", "7.240", "+12.2", "3"]  # fmt: skip
    assert heatmap_rows(GOOD) == [("task001_qa", "0.26", "0.74")]
    assert numbers("<p>7-8, (-2.9 ± 1e+02 %), −0.1, 1,2 and 12,345,678</p>") == [
        "7", "8", "-2.9 ± 1e+02", "-0.1", "1", "2", "12345678",
    ]  # fmt: skip


def test_what_follows_from_the_results_is_allowed() -> None:
    assert offenders(GOOD, made()) == []


@pytest.mark.parametrize(
    ("right", "wrong", "named"),
    [
        ("13.00 ± 4.4", "13.00 ± 4.3", "13.00 ± 4.3"),
        ("13.00 ± 4.4", "22.00 ± 4.4", "22.00 ± 4.4"),  # the mean of one line, the deviation of another
        ("+41.7", "-41.7", "-41.7 ± 14.4"),
        ("1,234", "1,235", "1235"),
        ("8.250", "8.260", "8.260"),
        ("0.74", "0.75", "task001_qa 0.26 0.75"),
    ],
)
def test_a_wrong_number_is_found(right: str, wrong: str, named: str) -> None:
    assert offenders(GOOD.replace(right, wrong, 1), made()) == [named]
