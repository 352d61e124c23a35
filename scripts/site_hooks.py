"""What mkdocs does beyond docs/: pages of the rest of the repository, links to files that are no pages, and formulas.

Pages under docs/ link to the rest of the repository as one does on a code host. Here those pages (results, benchmarks,
the log) become part of the site at the path they have, and a link to what is no page becomes the path in words.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "LOG.md", "examples/*.md", "experiments/**/*.md",
           "benchmarks/*.md", "src/smartmops/**/README.md")  # fmt: skip
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCED = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
UNESCAPED = {"&lt;": "<", "&gt;": ">", "&amp;": "&"}


def site_path(path: str) -> str:
    """Where a file of the repository stands in the site."""
    return path.removeprefix("docs/")


def outside() -> Iterator[str]:
    """Pages of the repository that are not in docs/, and the pictures that they show."""
    for pattern in OUTSIDE:
        for page in sorted(ROOT.glob(pattern)):
            yield page.relative_to(ROOT).as_posix()
            for picture, _, target in LINK.findall(page.read_text(encoding="utf-8")):
                found = (page.parent / target).resolve()
                if picture and found.is_file() and not found.is_relative_to(ROOT / "docs"):
                    yield found.relative_to(ROOT).as_posix()


def on_files(files: Files, config: Any) -> Files:
    """The pages outside docs/ are files of the site."""
    for path in dict.fromkeys(outside()):
        files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as they are in the repository become links in the site."""
    source = Path(page.file.abs_src_path).resolve().relative_to(ROOT)
    parts = re.split(FENCED.pattern, markdown, flags=FENCED.flags)
    if len(parts) == 1:
        return LINK.sub(lambda link: _moved(link, source, page.file.src_uri, files), markdown)
    done, at = [], 0
    for block in FENCED.finditer(markdown):
        between = markdown[at : block.start()]
        done += [LINK.sub(lambda link: _moved(link, source, page.file.src_uri, files), between), block[0]]
        at = block.end()
    done.append(LINK.sub(lambda link: _moved(link, source, page.file.src_uri, files), markdown[at:]))
    return "".join(done)


def _moved(link: re.Match[str], source: Path, here: str, files: Files) -> str:
    """One link of the page `source`, which stands at `here` in the site."""
    picture, text, target = link.groups()
    path, _, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", path):
        return link[0]
    found = Path(os.path.normpath(ROOT / source.parent / path))
    if not found.exists() or not found.is_relative_to(ROOT):
        return link[0]  # mkdocs says what is wrong with it
    inside = found.relative_to(ROOT).as_posix()
    if files.get_file_from_path(site_path(inside)) is None:
        return f"`{inside}`" if inside in text or text in inside else f"{text} (`{inside}`)"
    to = os.path.relpath(site_path(inside), PurePosixPath(here).parent)
    return f"{picture}[{text}]({to}{'#' if anchor else ''}{anchor})"


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Formulas as MathML, which browsers draw without a script."""
    return FORMULA.sub(_formula, html)


def _formula(found: re.Match[str]) -> str:
    latex = re.sub("|".join(UNESCAPED), lambda each: UNESCAPED[each[0]], found[3])
    display = "block" if found[2] == "[" else "inline"
    return str(latex2mathml.converter.convert(latex.strip(), display=display))
