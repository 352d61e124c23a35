"""The house rules a machine can check: rooms import downwards only, files stay short, nothing is called utils.py."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    "options",
    "lock",
    "tuner",
    "data",
    "tiny",
    "base",
    "compression",
    "training",
    "federated",
    "flower",
    "deployment",
    "analysis",
    "evidence",
    "reproduce",
    "bench_sides",
    "bench",
    "door",
    "serving",
    "surgery",
    "ending",
    "cli",
)
LIMIT = 400  # lines


def imported(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of all that `module` imports; of a package, `module` ends with `.__init__`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def upward(package: Path) -> list[str]:
    """Imports of a room from a later room, or from the package itself, which stands above all rooms but the doors."""
    found = []
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        if parts == ("__init__",):
            continue
        if parts[0] not in ROOMS:
            found.append(f"{file}: {parts[0]!r} is no room: choose one of {', '.join(ROOMS)}")
            continue
        for line, name in imported(file.read_text(encoding="utf-8"), ".".join((package.name, *parts))):
            top, _, rest = name.partition(".")
            room = rest.split(".")[0]
            if top != package.name or (room not in ROOMS and parts[0] == "cli"):
                continue
            if room not in ROOMS or ROOMS.index(room) > ROOMS.index(parts[0]):
                found.append(f"{file}:{line}: {parts[0]} imports {name}, which stands above it")
    return found


def untidy(*folders: Path) -> list[str]:
    """Files that are too long, or named for nothing."""
    found = []
    for file in sorted(file for folder in folders for file in folder.rglob("*.py")):
        if (lines := len(file.read_text(encoding="utf-8").splitlines())) > LIMIT:
            found.append(f"{file}: {lines} lines, but {LIMIT} is the limit: split it")
        if file.name == "utils.py":
            found.append(f"{file}: name the file for what it knows")
    return found


def test_rooms_import_downwards_only() -> None:
    assert upward(ROOT / "src/smartmops") == []


def test_files_are_short_and_named_for_something() -> None:
    assert untidy(*(ROOT / name for name in ("src", "tests", "experiments", "benchmarks", "examples"))) == []


@pytest.mark.parametrize(
    ("file", "source", "named"),
    [
        ("tuner/gate.py", "from ..data.example import Example", "smartmops.data.example.Example"),
        ("tuner/gate.py", "from .. import data", "smartmops.data"),
        ("tuner/__init__.py", "from ..training import runs", "smartmops.training.runs"),
        ("tuner/gate.py", "import smartmops.cli", "smartmops.cli"),
        ("data/tasks.py", "def f():\n    from smartmops.tiny import load", "smartmops.tiny.load"),
        ("training/train.py", "from smartmops import MoPsConfig", "smartmops.MoPsConfig"),
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
        ("tuner/model.py", "from . import gate\nfrom .gate import Gate\nimport torch.nn"),
        ("training/train.py", "from ..tuner.config import MoPsConfig\nfrom smartmops.data import batches"),
        ("cli.py", "from . import serving\nfrom smartmops import MoPsConfig\nfrom .analysis.report import report"),
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
