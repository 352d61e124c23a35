"""docs/reliability.json and the page written from it: what scripts/kill_runs and scripts/fuzz found. Runs nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parents[1] / "docs" / "reliability.json"


def keep(file: Path, part: str, name: str, value: Any) -> dict[str, Any]:
    """Enter a finding and write the page again; all that is known."""
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    found.setdefault(part, {})[name] = value
    file.write_text(json.dumps(found, indent=2) + "\n")
    file.with_suffix(".md").write_text("\n".join(lines(found)) + "\n")
    return found


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The page."""
    yield from ("# Reliability", "", "Written by `scripts/kill_runs` and `scripts/fuzz` from `reliability.json`.", "")
    if "kill" in found:
        yield from kills(found["kill"])
    if "fuzz" in found:
        yield from fuzzed(found["fuzz"])


def kills(found: dict[str, Any]) -> Iterator[str]:
    """Runs that were killed and resumed."""
    yield from ("## Killed and resumed", "")
    yield (
        "Each run was killed with SIGKILL at a random moment, every second one once more while it was resumed, and "
        "then resumed to its end. It counts as the same where its weights are the same bytes, and its numbers but "
        "for times and memory the same digits, as those of a run that was left alone."
    )
    yield from ("", "| command | runs | kills | the same result |", "|---|---|---|---|")
    for name, each in found.items():
        yield f"| `{name}` | {each['runs']} | {each['kills']} | {each['same']} of {each['runs']} |"
    yield ""


def fuzzed(found: dict[str, Any]) -> Iterator[str]:
    """Inputs that readers were given."""
    yield from ("## Damaged inputs", "")
    yield (
        "Each reader was given inputs that hypothesis drew: whole ones, and ones with fields, sizes and bytes changed. "
        "It has to read them, or to refuse them in one line of its own, within 2 GiB of memory."
    )
    yield from ("", "| reader | read | refused | faults |", "|---|---|---|---|")
    for name, each in found.items():
        yield f"| {name} | {each['read']:,} | {each['refused']:,} | {each['fault'] or 'none'} |"
    yield ""
