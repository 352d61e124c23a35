"""The shape of the house: rooms and their order, files a room, lengths, imports. Prints counts; fails on a broken rule.

python scripts/shape.py [ROOT]
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

# A room imports only rooms before it.
ROOMS = (
    "checks", "traits", "options", "settings", "progress", "rows",
    "backbone", "attention", "experts", "adapter", "calls", "tuner",
    "tiny", "data", "tokens", "gguf", "base", "compression",
    "runs", "states", "reading", "evaluation", "methods", "preparing", "fitting", "flow", "analysis",
    "clients", "federated", "flower", "deployment",
    "report", "evidence", "reproduce", "bench", "door", "playground", "serving", "web", "surgery", "handover", "ending",
    "starting", "cli", "__main__",
)  # fmt: skip
FILE_LINES = 400
FUNCTION_LINES = 60
FILES_PER_ROOM = 6  # beside __init__.py; of tests, beside conftest.py


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
    """Imports of a room from a later room, or from the package itself, which stands above all rooms but the doors.

    Where there are none, there is no cycle of rooms either.
    """
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
    """Files and functions that are too long, and files named for nothing."""
    found = []
    for file in sorted(file for folder in folders for file in folder.rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        if (lines := len(source.splitlines())) > FILE_LINES:
            found.append(f"{file}: {lines} lines, but {FILE_LINES} is the limit: split it")
        if file.name == "utils.py":
            found.append(f"{file}: name the file for what it knows")
        found += [
            f"{file}:{line}: {name} has {length} lines, but {FUNCTION_LINES} is the limit: split it"
            for name, line, length in functions(source)
            if length > FUNCTION_LINES
        ]
    return found


def functions(source: str) -> list[tuple[str, int, int]]:
    """Name, first line and number of lines of each function, docstring and nested functions included."""
    return [
        (node.name, node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def crowded(*houses: Path) -> list[str]:
    """Rooms with more files than one sees at a glance."""
    found = []
    for room in sorted({file.parent for house in houses for file in house.rglob("*.py")}):
        count = sum(file.name not in ("__init__.py", "conftest.py") for file in room.glob("*.py"))
        if count > FILES_PER_ROOM:
            found.append(f"{room}: {count} files, but {FILES_PER_ROOM} is the limit: make two rooms of it")
    return found


def counts(package: Path) -> str:
    """What the house measures, in one line."""
    sources = [file.read_text(encoding="utf-8") for file in package.rglob("*.py")]
    lengths = [length for source in sources for _, _, length in functions(source)]
    rooms = {file.parent for file in package.rglob("*.py")} - {package}
    lines = sum(len(source.splitlines()) for source in sources)
    return (f"{len(rooms)} rooms, {len(sources)} files, {lines:,} lines; {len(lengths):,} functions, "
            f"median {statistics.median(lengths):.0f} lines, longest {max(lengths)}")  # fmt: skip


def main(root: Path) -> int:
    """Print the counts and every broken rule; 1 where there is one."""
    package = root / "src/smartmops"
    folders = [root / name for name in ("src", "tests", "experiments", "benchmarks", "examples", "scripts")]
    problems = upward(package) + untidy(*folders) + crowded(package, root / "tests")
    print(counts(package), *problems, sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1])))
