"""The house rules a machine can check: rooms import downwards only, files stay short, nothing is called utils.py."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHAPE = runpy.run_path(str(ROOT / "scripts/shape.py"))
upward, untidy, crowded, LIMIT = (SHAPE[name] for name in ("upward", "untidy", "crowded", "FILE_LINES"))


def test_rooms_import_downwards_only() -> None:
    assert upward(ROOT / "src/smartmops") == []


def test_files_are_short_and_named_for_something() -> None:
    assert untidy(*(ROOT / name for name in ("src", "tests", "experiments", "benchmarks", "examples"))) == []


@pytest.mark.parametrize(
    ("file", "source", "named"),
    [
        ("tuner/layer.py", "from ..data.tasks import read", "smartmops.data.tasks.read"),
        ("experts/gate.py", "from .. import data", "smartmops.data"),
        ("tuner/__init__.py", "from ..runs import folder", "smartmops.runs.folder"),
        ("experts/gate.py", "import smartmops.cli", "smartmops.cli"),
        ("data/tasks.py", "def f():\n    from smartmops.base import load", "smartmops.base.load"),
        ("flow/trainer.py", "from smartmops import MoPsConfig", "smartmops.MoPsConfig"),
        ("serving/server.py", "from ..cli import main", "smartmops.cli.main"),
        ("helpers/a.py", "", "'helpers' is no room"),
    ],
)
def test_an_upward_import_is_found(tmp_path: Path, file: str, source: str, named: str) -> None:
    bad = tmp_path / "smartmops" / file
    bad.parent.mkdir(parents=True)
    bad.write_text(source)
    (problem,) = upward(tmp_path / "smartmops")
    assert file in problem and named in problem


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("tuner/model.py", "from . import layer\nfrom .layer import MoPsLayer\nimport torch.nn"),
        ("flow/trainer.py", "from ..tuner import MoPsConfig\nfrom smartmops.tokens import batches"),
        ("cli.py", "from . import serving\nfrom smartmops import MoPsConfig\nfrom .report.report import report"),
        ("__init__.py", "from .tuner import MoPsConfig"),
    ],
)
def test_a_downward_import_is_fine(tmp_path: Path, file: str, source: str) -> None:
    good = tmp_path / "smartmops" / file
    good.parent.mkdir(parents=True)
    good.write_text(source)
    assert upward(tmp_path / "smartmops") == []


def test_long_files_and_utils_are_found(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text("\n" * (LIMIT + 1))
    (tmp_path / "short.py").write_text("\n" * LIMIT)
    (tmp_path / "utils.py").write_text("")
    long, utils = untidy(tmp_path, tmp_path / "missing")
    assert "long.py: 401 lines" in long and "utils.py: name the file" in utils


def test_no_room_is_crowded() -> None:
    assert crowded(ROOT / "src/smartmops", ROOT / "tests") == []


def test_a_crowded_room_and_a_long_function_are_found(tmp_path: Path) -> None:
    for name in ("__init__", "conftest", *"abcdef"):
        (tmp_path / f"{name}.py").write_text("")
    assert crowded(tmp_path) == []
    (tmp_path / "g.py").write_text("def long():\n" + "    1\n" * SHAPE["FUNCTION_LINES"])
    (full,) = crowded(tmp_path)
    (function,) = untidy(tmp_path)
    assert "7 files" in full and "long has 61 lines" in function
