"""Pages in, one self-contained HTML file out. Knows blocks, not results, and asks nothing of the network.

Gathers plain data for the template `report.html`, which draws it: styles are inline, pictures are data in the file.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smartmops.checks.errors import FederationError, MissingExtra
from smartmops.report.gates import tables as gate_tables
from smartmops.runs.folder import write_text

from .page import Block, Gates, Page, Picture, Table, Text

WIDE = 800  # pixels; a wider picture scrolls on a phone, for its words would be too small to read
SMALLEST = 0.6  # of its own size, to which such a picture is shrunk
LONGEST = 16  # letters of a name without a place to break
_NUMBER = re.compile(r"[+−-]?[\d.,]+(e[+-]?\d+)?( ± [\d.,]+(e[+-]?\d+)?)?( ?%| \(\d+ seeds?\)| of [\d,]+)?|–|not run|")
_WIDTH = re.compile(r'<svg\b[^>]*?\swidth="([\d.]+)(pt|px)?"')


def write_html(pages: Sequence[Page], folder: Path, out: Path) -> None:
    """Write all pages as one HTML file; the same pages give the same bytes.

    Args:
        pages: In the order of the contents.
        folder: Holds the pictures; the page says so where one is missing.
        out: The file to write.

    Raises:
        MissingExtra: jinja2 is not installed.
        RunError: gate weights are broken; the message names the page.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtra("the report is laid out with jinja2: pip install 'smartmops[report]'") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"parts": parts, "pieces": pieces}
    drawn = [{"id": anchor(page.name), "title": page.title, "blocks": _blocks(page, folder)} for page in pages]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, environment.get_template("report.html").render(pages=drawn))


def anchor(name: str) -> str:
    """A page's name as the target of a link."""
    return re.sub(r"[^\w.-]+", "-", name)


def parts(words: str) -> list[str]:
    """Text and code by turns, text first; a backtick without another stays as it is."""
    return re.split(r"`([^`]+)`", words)


def pieces(name: str) -> list[str]:
    """A name in pieces between which a line may end: after underscores, and within what is long without one."""
    return re.findall(rf"\s*[^_\s]{{1,{LONGEST}}}_*|\s*_+|\s+", name)


def numeric(cells: Sequence[str]) -> bool:
    """Whether a column holds numbers, alone or with what tables put beside them, or where there is none."""
    return any(cells) and all(_NUMBER.fullmatch(cell) for cell in cells)


def _blocks(page: Page, folder: Path) -> list[dict[str, Any]]:
    try:
        return [_block(block, folder) for block in page.blocks]
    except ValueError as error:
        raise FederationError(f"{page.name}: {error}") from error


def _block(block: Block, folder: Path) -> dict[str, Any]:
    if isinstance(block, Text):
        return {"kind": "text", "words": block.words}
    if isinstance(block, Picture):
        return {"kind": "picture", "name": block.name, "words": block.words, **_picture(folder / f"{block.name}.svg")}
    return _table(block) if isinstance(block, Table) else _gates(block)


def _table(block: Table) -> dict[str, Any]:
    columns = [[row[place] for row in block.rows] for place in range(len(block.heads))]
    numbers = [place > 0 and numeric(column) for place, column in enumerate(columns)]
    return {"kind": "table", "title": block.title, "heads": block.heads, "rows": block.rows, "numbers": numbers}


def _picture(file: Path) -> dict[str, Any]:
    """The file as data, and how far it may shrink."""
    if not file.is_file():
        return {"data": None, "smallest": 0}
    svg = file.read_bytes()
    found = _WIDTH.search(svg.decode("utf-8", errors="replace"))
    width = 0.0 if found is None else float(found[1]) * (4 / 3 if found[2] == "pt" else 1)
    data = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
    return {"data": data, "smallest": round(SMALLEST * width) if width > WIDE else 0}


def _gates(block: Gates) -> dict[str, Any]:
    """A table a stage, with shades on one scale from 0 to the largest weight of all stages."""
    stages = gate_tables(block.gates)
    highest = max((w for table in stages.values() for row in table.weights.values() for w in row), default=0) or 1
    drawn = [
        {"stage": stage, "experts": table.experts,
         "rows": [(task, [(f"{w:.2f}", round(w / highest, 3), w == max(row)) for w in row])
                  for task, row in table.weights.items()]}
        for stage, table in stages.items()
    ]  # fmt: skip
    return {"kind": "gates", "title": block.title, "stages": drawn}
