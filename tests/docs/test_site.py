"""The site builds without a warning and stands on its own; pages that scripts write are up to date."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from shown import ROOT

import smartmops as sm

LOADED = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?([^\"' >]+)[^>]*>")


def test_pages_that_scripts_write_are_what_they_would_write(capsys: pytest.CaptureFixture[str]) -> None:
    found = runpy.run_path(str(ROOT / "scripts/site/write.py"))["stale"]()
    assert list(found) == [], "run: python scripts/site/write.py"


def test_the_page_of_the_api_has_every_public_name() -> None:
    shown = re.findall(r"^::: smartmops\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(set(sm.__all__) - {"__version__"})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built."""
    for name in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(name, reason="pip install 'smartmops[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)], cwd=ROOT,
                          capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})  # fmt: skip
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return folder


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        for tag in LOADED.finditer(page.read_text(encoding="utf-8")):
            target = tag[1].split("#")[0].split("?")[0]
            if 'rel="canonical"' in tag[0] or target.startswith("data:"):
                continue
            assert "//" not in target, f"{page.name}: {tag[0]}"
            if not target.startswith("/"):  # the page for what is not found has absolute ones
                assert (page.parent / target).exists(), f"{page.name}: {tag[0]}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet
        assert "@import" not in sheet.read_text(encoding="utf-8"), sheet


@pytest.mark.slow
def test_the_site_has_formulas_docstrings_and_results(site: Path) -> None:
    method = (site / "method.html").read_text(encoding="utf-8")
    assert method.count("<math") > 20 and "arithmatex" not in method
    api = (site / "api.html").read_text(encoding="utf-8")
    for name in sorted(set(sm.__all__) - {"__version__"}):
        assert f'id="smartmops.{name}"' in api, name
    assert "FileExistsError" in api  # what `train` raises
    assert "Written by" in (site / "experiments/smollm2/index.html").read_text(encoding="utf-8")
    assert (site / "search/search_index.js").stat().st_size > 100_000
