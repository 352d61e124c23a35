"""The report: self-contained, well formed, everything escaped; in a real browser, nothing runs off a phone's screen."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from smartmops.evidence.html import LONGEST, anchor, numeric, parts, pieces, write_html
from smartmops.evidence.page import Gates, Page, Picture, Table, Text

EVIL = "<script>alert('x')</script>&amp;\"$a$"
LONG = "REBUILT_task1703_" + "ljspeech_" * 5 + "textmodification"
UNBROKEN = "x" * 70
SVG = '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="{}pt" height="90pt"><path id="a"/></svg>'
GATES = {
    "experts": [LONG, "データ", EVIL, UNBROKEN],
    "after": {LONG: [0.7, 0.1, 0.1, 0.1], UNBROKEN: [0.0, 0.04, 0.06, 0.9]},
    "before": {LONG: [0.25, 0.25, 0.25, 0.25], UNBROKEN: [0.1, 0.2, 0.3, 0.4]},
}
VOID = {"meta", "link", "br", "wbr", "img"}


class Reader(HTMLParser):
    """Elements, attributes and text of a page; fails on a tag closed out of turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th", "caption"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if {"td", "th", "caption"} & set(self.open):
            self.cells[-1] += data.strip("\n")


def report(folder: Path) -> str:
    """A report with every kind of block, and names that try to break it."""
    (folder / "wide.svg").write_text(SVG.format(979.2))
    (folder / "small.svg").write_text(SVG.format(300))
    numbers = [["75%", "9.500 ± 0.12", "+5.0 ± 0.1 %"], [LONG, "12,345 (1 seed)", "not run"]]
    blocks = [
        Text(f"Written by `smartmops {UNBROKEN}` from `results/`. {EVIL} {UNBROKEN}"),
        Table(f"dolly {UNBROKEN}", ["base", "MoPs", f"gain {EVIL}"], numbers),
        Table("", ["", *[f"column {n}" for n in range(12)]], [[UNBROKEN, *[EVIL] * 12]]),
        Picture("wide", f"{EVIL} by round"),
        Picture("small", "small"),
        Picture("gone", "never drawn"),
        Gates(f"dolly, 75% {UNBROKEN}", GATES, "gates"),
        Gates("no stage", {"experts": ["a"]}, "none"),
    ]
    pages = [Page("table2", f"Central training {EVIL}", blocks), Page("figure 5", f"данные {UNBROKEN}", [Text("One.")])]
    write_html(pages, folder, folder / "out" / "report.html")
    return (folder / "out" / "report.html").read_text(encoding="utf-8")


def test_the_report_holds_every_block(tmp_path: Path) -> None:
    read = Reader(report(tmp_path))
    for words in ("Central training", "данные", "Before training", "After training", "No gate weights were kept",
                  "The picture gone.svg is missing: never drawn."):  # fmt: skip
        assert words in read.text, words
    for cell in ("75%", "9.500 ± 0.12", "+5.0 ± 0.1 %", LONG, UNBROKEN, "データ", EVIL, f"dolly {UNBROKEN}"):
        assert cell in read.cells, cell
    assert [tag for tag, _ in read.tags].count("table") == 4 and "During training" not in read.text
    links = [a["href"] for tag, a in read.tags if tag == "a"]
    assert links[:2] == ["#table2", "#figure-5"]
    assert {link[1:] for link in links if link} == {a["id"] for _, a in read.tags if "id" in a}


def test_heatmaps_hold_names_and_weights_shaded_on_one_scale(tmp_path: Path) -> None:
    read = Reader(report(tmp_path))
    start = read.cells.index("Before training")
    assert read.cells[start : read.cells.index("After training")] == [
        "Before training", "", LONG, "データ", EVIL, UNBROKEN,
        LONG, "0.25", "0.25", "0.25", "0.25",
        UNBROKEN, "0.10", "0.20", "0.30", "0.40",
    ]  # fmt: skip
    shades = [a["style"] for tag, a in read.tags if tag == "td" and "style" in a]
    assert shades[0] == "--shade: 0.278" and shades[-1] == "--shade: 1.0"  # 0.25 and 0.9 of 0.9


def test_the_report_asks_nothing_of_the_network(tmp_path: Path) -> None:
    html = report(tmp_path)
    read = Reader(html)
    assert not {tag for tag, _ in read.tags} & {"script", "iframe", "object", "embed", "svg", "base"}
    found = [value or "" for _, a in read.tags for key, value in a.items() if key in ("href", "src", "srcset")]
    assert found and all(link.startswith(("#", "data:")) for link in found)
    assert not re.search(r"https?://|@import|url\(", html)
    assert any("default-src 'none'" in (a.get("content") or "") for _, a in read.tags)
    assert not [name for _, a in read.tags for name in a if name.startswith("on")]


def test_pictures_are_data_with_words_and_only_wide_ones_keep_a_width(tmp_path: Path) -> None:
    wide, small = (a for tag, a in Reader(report(tmp_path)).tags if tag == "img")
    assert wide["alt"] == f"{EVIL} by round" and wide["style"] == "min-width: 783px"
    assert small["alt"] == "small" and "style" not in small
    assert all((a["src"] or "").startswith("data:image/svg+xml;base64,") for a in (wide, small))


def test_text_is_escaped_everywhere(tmp_path: Path) -> None:
    html = report(tmp_path)
    assert "<script" not in html
    read = Reader(html)
    assert read.text.count(EVIL) > 15 and f"smartmops {UNBROKEN}" in read.text and "`" not in read.text


def test_the_same_pages_give_the_same_bytes(tmp_path: Path) -> None:
    assert report(tmp_path) == report(tmp_path)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["report.html"]


def test_code_stands_in_backticks_and_names_break_after_underscores() -> None:
    assert parts("a `b c` d `e`") == ["a ", "b c", " d ", "e", ""] and parts("5` a") == ["5` a"]
    assert pieces("open_qa, at layer 3") == ["open_", "qa,", " at", " layer", " 3"]
    assert pieces("") == [] and pieces("__a__") == ["__", "a__"] and max(map(len, pieces(UNBROKEN))) == LONGEST
    assert anchor("table 2/é") == "table-2-é"


@pytest.mark.parametrize(
    ("cells", "is_numeric"),
    [
        (["151.9", "12,345", "–"], True),
        (["107.0 ± 1.1", "1.2 ± 1e+02", "not run", "12.5 (1 seed)"], True),
        (["-2.9 ± 0.2 %", "+21.2 %", "3 of 12"], True),
        (["75%", "dense"], False),
        (["0.1", "2 experts"], False),
        (["", ""], False),
        ([], False),
    ],
)
def test_a_column_of_numbers_is_told_from_words(cells: list[str], is_numeric: bool) -> None:
    assert numeric(cells) is is_numeric


def test_what_is_broken_or_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Page("figure5", "Gates", [Gates("", {"experts": ["a"], "after": {"qa": [0.5]}}, "gates")])
    with pytest.raises(ValueError, match=r"figure5: gates\.json, after\.qa sums to 0\.5, not 1"):
        write_html([bad], tmp_path, tmp_path / "report.html")
    monkeypatch.setitem(sys.modules, "jinja2", None)  # what Python does for a module that cannot be imported
    with pytest.raises(ImportError, match=r"pip install 'smartmops\[report\]'"):
        write_html([], tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


PHONE = """<!doctype html><title>phone</title><output></output>
<iframe src="{}" style="width: 360px; height: 740px; border: 0"></iframe><script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument;
  const hidden = [...page.querySelectorAll(".scroll")].filter((box) => box.scrollWidth > box.clientWidth).length;
  document.querySelector("output").textContent = `${{page.documentElement.scrollWidth}} wide, ${{hidden}} scroll`;
}};
</script>"""


QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files",
)  # fmt: skip


def chromium(profile: Path, *arguments: str) -> str:
    """What a headless Chromium writes; skips where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((found for name in names if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("a real browser: no Chromium here; apt-get install chromium")
    done = subprocess.run([program, *QUIET, f"--user-data-dir={profile}", *arguments], capture_output=True, text=True,
                          timeout=1200, check=True)  # fmt: skip
    return done.stdout


def measured(folder: Path, page: Path) -> tuple[int, int]:
    """How wide a page is in a frame 360 pixels wide, and how many of its boxes scroll."""
    (folder / "phone.html").write_text(PHONE.format(page.as_uri()))
    dom = chromium(folder / "profile", "--virtual-time-budget=3000", "--dump-dom", (folder / "phone.html").as_uri())
    found = re.search(r"<output>(\d+) wide, (\d+) scroll</output>", dom)
    assert found, dom
    return int(found[1]), int(found[2])


@pytest.mark.slow
def test_on_a_phone_tables_scroll_and_the_page_does_not(tmp_path: Path) -> None:
    report(tmp_path)
    width, scrolling = measured(tmp_path, tmp_path / "out" / "report.html")
    assert width <= 360 and scrolling >= 4
    (tmp_path / "wide.html").write_text("<!doctype html><div style='width: 500px'>wide</div>")
    assert measured(tmp_path, tmp_path / "wide.html") == (508, 0)  # so a page that is too wide is seen


@pytest.mark.slow
def test_a_browser_reads_and_draws_the_report(tmp_path: Path) -> None:
    report(tmp_path)
    page = (tmp_path / "out" / "report.html").as_uri()
    read = Reader(chromium(tmp_path / "profile", "--dump-dom", page))
    assert LONG in read.cells and EVIL in read.cells and "0.90" in read.cells
    chromium(tmp_path / "profile", f"--screenshot={tmp_path / 'phone.png'}", "--window-size=360,740", page)
    data = (tmp_path / "phone.png").read_bytes()
    assert data.startswith(b"\x89PNG") and int.from_bytes(data[16:20]) == 360 and len(data) > 5000
