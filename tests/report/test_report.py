"""The page: self-contained, well formed, everything escaped, absent parts left out."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser

import pytest

from smartmops.report import results
from smartmops.report.report import SAMPLES_PER_TASK, flat, report, short, visible
from smartmops.runs.folder import Run

EVIL = "<script>alert('x')</script>&amp;\"$a$"
VOID = {"meta", "link", "br", "line", "polyline"}


class Reader(HTMLParser):
    """Elements, attributes and text of a page; fails on a tag closed out of turn."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "style" not in self.open:
            self.texts.append(text)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


def quickstart(path, word="qa", scale=1.0):
    run = Run.create(path, {"command": "quickstart", "base": "tiny", "data": "office", "seeds": [0, 1], "note": word})
    for seed in (0, 1):
        for method in ("ungated", "mops"):
            for step in range(1, 80):
                run.append_curve({"step": step, "loss": scale / step, "method": method, "seed": seed})
            run.append_curve({"step": 79, "eval_perplexity": 2.0, "method": method, "seed": seed})
    run.write_gates({"experts": [word, "b"], "before": {word: [0.5, 0.5]}, "after": {word: [0.9, 0.1]}})
    fields = ("category", "instruction", "context", "frozen")
    sample = {**dict.fromkeys(fields, word), "reference": "a\nb", "adapted": ""}
    run.write_samples([sample] * (SAMPLES_PER_TASK + 2))
    run.write_metrics(
        {
            "perplexity": {"frozen": 3.4, "ungated": 2.8, "mops": 1.3 * scale},
            "per_task": {m: {word: p, "b": p} for m, p in (("frozen", 3.0), ("ungated", 2.5), ("mops", 1.3 * scale))},
            "per_seed": {"mops": [1.2 * scale, 1.4 * scale]},
            "seeds": [0, 1],
            "tokens": {word: 123},
        }
    )
    return run.path


def train(path, data="office"):
    run = Run.create(path, {"command": "train", "base": "tiny", "data": data, "seed": 0, "method": "mops"})
    run.write_metrics({"perplexity": {"overall": 5.0, "per_task": {"qa": 5.0}}})
    return run.path


def page(*runs, out):
    return report(list(runs), out).read_text(encoding="utf-8")


def test_the_page_shows_the_run(tmp_path):
    path = report([quickstart(tmp_path / "run")], tmp_path / "pages" / "my.html")
    assert path == tmp_path / "pages" / "my.html" and report([tmp_path / "run"], tmp_path).name == "report.html"
    text = Reader(path.read_text(encoding="utf-8")).text.replace("\u00a0", " ").replace("\u202f", " ")
    for words in (
        "tiny on 2 tasks of office",
        "MoPs lowers the frozen model’s perplexity from 3.40 to 1.30 ± 0.14 (−62 %)",
        "standard deviation over 2 seeds",
        "Training loss, nats per token",
        "Evaluation perplexity",
        "Before training",
        "After training",
        "Mean entropy 0.69 nats",
        "Mean entropy 0.33 nats",
        "(empty)",
        "2 more in samples.jsonl",
        "tokens.qa 123",
        "versions.torch",
    ):
        assert words in text, words


def test_the_lowest_of_each_row_is_bold(tmp_path):
    html = page(quickstart(tmp_path / "run"), out=tmp_path)
    bold = re.findall(r'<td class="lowest">([\d.]+)', html)
    assert bold == ["1.30", "1.30", "1.30"]  # two tasks and all


def test_the_page_asks_nothing_of_the_network(tmp_path):
    read = Reader(html := page(quickstart(tmp_path / "run", EVIL), train(tmp_path / "b"), out=tmp_path))
    assert not {tag for tag, _ in read.tags} & {"script", "img", "iframe", "object", "embed", "use", "image", "base"}
    links = [value for _, a in read.tags for key, value in a.items() if key in ("href", "src", "srcset", "action")]
    assert links and all(link.startswith("#") or link == "data:," for link in links)
    assert not re.search(r"https?://|@import|url\(", html)
    assert any("default-src 'none'" in a.get("content", "") for _, a in read.tags)
    assert not [name for _, a in read.tags for name in a if name.startswith("on")]
    targets = {a["id"] for _, a in read.tags if "id" in a}
    assert {link[1:] for link in links if link.startswith("#")} == targets == {"run-1", "run-2"}


def test_text_is_escaped_everywhere(tmp_path):
    html = page(quickstart(tmp_path / "<i>evil", EVIL), quickstart(tmp_path / "b", EVIL, 2.0), out=tmp_path)
    assert "<script" not in html and "<i>evil" not in html
    text = Reader(html).text
    assert text.count(EVIL) > 20 and "<i>evil" in text


def test_newlines_and_control_characters_are_shown(tmp_path):
    html = page(quickstart(tmp_path / "run"), out=tmp_path)
    assert 'a<span class="newline" aria-hidden="true">↵</span>\nb' in html
    assert visible("a\nb\r\x1b\x7f\tü") == ["a", "b␍␛␡\tü"]


def test_lines_stay_short(tmp_path):
    html = page(quickstart(tmp_path / "a"), quickstart(tmp_path / "b", scale=60), out=tmp_path)
    assert max(map(len, html.splitlines())) < 240


def test_absent_parts_leave_their_section_out(tmp_path):
    run = train(tmp_path / "run")
    headings = re.findall(r"<h2>(.*?)</h2>", page(run, out=tmp_path))
    assert headings == ["Perplexity", "By task", "Details"]
    bare = Run.create(tmp_path / "bare", {"command": "compress", "seed": 0})
    bare.write_metrics({"sparsity": 0.75})
    html = page(bare.path, out=tmp_path)
    assert re.findall(r"<h2>(.*?)</h2>", html) == ["Details"] and "0.75" in html and "xponential" not in html


def test_several_runs_stand_side_by_side(tmp_path):
    paths = [quickstart(tmp_path / "a" / "run"), quickstart(tmp_path / "b" / "run", scale=1.5)]
    html = page(*paths, out=tmp_path)
    text = Reader(html).text
    assert "2 runs compared" in text and "a/run" in text and "b/run" in text and "can be compared" not in text
    table = html[html.index("Side by side") : html.index('id="run-1"')]
    assert re.findall(r'<td class="lowest">([\d.]+)', table) == ["1.30", "1.30", "1.30"]
    other = Reader(page(paths[0], train(tmp_path / "c", "dolly"), out=tmp_path)).text
    assert "These runs differ in their data" in other
    assert re.search(r"Where they differ .*command quickstart train", other)


def test_the_same_run_twice_is_one_run(tmp_path):
    run = train(tmp_path / "run")
    assert page(run, run, out=tmp_path) == page(run, out=tmp_path)


@pytest.mark.parametrize(("other", "used", "marked"), [([0.0, 0.0], {"0.0"}, 0), ([0.0, 0.3], {"0.0", "1.0"}, 1)])
def test_a_task_that_is_left_to_the_base_uses_no_expert(tmp_path, other, used, marked):
    run = train(tmp_path / "run")
    told = {"experts": ["qa", "b"], "left_to_base": True, "after": {"qa": [0.0, 0.0], "b": other}}
    (run / "gates.json").write_text(json.dumps(told))
    shown = page(run, out=tmp_path)
    assert {*re.findall(r'class="used">([\d.]+)<', shown)} == used and len(
        re.findall(r'class="cell[^"]* most"', shown)
    ) == marked


def test_bad_input_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="at least one run"):
        report([], tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        report([tmp_path / "none"], tmp_path)
    run = train(tmp_path / "run")
    (run / "gates.json").write_text('{"experts": ["a"], "after": {"qa": [0.5]}}')
    with pytest.raises(ValueError, match=r"run: gates\.json, after\.qa sums to 0\.5, not 1"):
        report([run], tmp_path)
    (run / "gates.json").write_text('{"experts": ["a"], "after": {"qa": [1.5]}}')
    with pytest.raises(ValueError, match=r"run: gates\.json, after\.qa=\[1\.5\] has a weight outside 0 to 1"):
        report([run], tmp_path)
    (run / "gates.json").write_text("{")
    with pytest.raises(ValueError, match=r"gates\.json is not valid JSON"):
        report([run], tmp_path)
    assert not (tmp_path / "report.html").exists()
    monkeypatch.setitem(sys.modules, "jinja2", None)  # what Python does for a module that cannot be imported
    with pytest.raises(ImportError, match=r"pip install 'smartmops\[report\]'"):
        report([run], tmp_path)


def test_settings_are_flattened():
    nested = {"a": {"b": [1, 2.5], "c": None, "d": True}, "e": [{"f": 1e-7}], "g": {}, "h": []}
    assert dict(flat(nested)) == {
        "a.b": "1, 2.5", "a.c": "none", "a.d": "yes", "e[0].f": "1e-07", "g": "none", "h": "none"
    }  # fmt: skip
    assert short("../data/dolly-15k.jsonl") == "dolly-15k" and short("org/model-1.1B/") == "model-1.1B"


def test_numbers_of_other_test_splits_are_not_held_against_each_other(tmp_path):
    paths = [quickstart(tmp_path / "a"), quickstart(tmp_path / "b", scale=1.5)]
    for number, path in enumerate(paths):
        (path / "inputs.json").write_text(json.dumps({"test split": str(number)}))
    html = page(*paths, out=tmp_path)
    assert "These runs differ in their test split" in Reader(html).text
    assert not re.findall(r'<td class="lowest">', html[html.index("Side by side") : html.index('id="run-1"')])
    (paths[1] / "inputs.json").write_text(json.dumps({"test split": "0"}))
    assert "can be compared" not in Reader(page(*paths, out=tmp_path)).text


def test_a_tie_is_not_won():
    row = {"a": results.Estimate(2.0), "b": results.Estimate(3.0)}
    overall = {"frozen": results.Estimate(2.4), "mops": results.Estimate(2.4)}
    tied = results.Results(overall, {"frozen": row, "mops": row}, "mops")
    assert "on 0 of 2 tasks" in results.summary(tied)
