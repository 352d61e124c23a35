"""Write every page and drawing of docs/ that is made from something else: parsers, results files, code.

python scripts/site/write.py            write those that changed, and say which
python scripts/site/write.py --check    write nothing; exit status 1 and their names where some are stale
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WRITERS = ("commands", "choosing", "drawings")


def made() -> dict[str, str]:
    """Every file that a script writes, by its path in the repository."""
    if str(Path(__file__).parent) not in sys.path:
        sys.path.insert(0, str(Path(__file__).parent))
    found: dict[str, str] = {}
    for name in WRITERS:
        found |= import_module(name).files()
    return found


def stale() -> dict[str, str]:
    """Of `made`, what differs from the file that is there."""
    there = {path: ROOT / path for path in made()}
    return {path: text for path, text in made().items()
            if not there[path].is_file() or there[path].read_text(encoding="utf-8") != text}  # fmt: skip


def main() -> None:
    """As the file says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, say what is stale")
    arguments = parser.parse_args()
    found = stale()
    for path, text in found.items():
        print(path)
        if not arguments.check:
            (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
            (ROOT / path).write_text(text, encoding="utf-8")
    if arguments.check and found:
        sys.exit(1)


if __name__ == "__main__":
    main()
