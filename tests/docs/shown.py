"""What the pages show: their blocks of code, the shell lines in them, and what each becomes at a size for tests."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import get_type_hints

from smartmops import cli
from smartmops.checks.limits import typed
from smartmops.settings.described import described, subcommands

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "examples/README.md",
        *(ROOT / "docs").glob("*.md"),
    )
    if path.name != "commands.md"  # written from the parsers themselves
)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Parsed here, and run by the tests of their own rooms: they need other machines, processes, a GPU's time, or hours.
ELSEWHERE = {
    "quickstart": "tests/test_cli.py, at small size", "federate-server": "tests/deployment", "federate-client": "tests/deployment",
    "serve": "tests/serving; its client is run below", "reproduce": "tests/reproduce", "bench": "tests/bench", "export": "tests/handover", "push": "tests/handover",
    "suite": "tests/evaluation", "python": "tests/docs/test_examples.py, tests/handover or tests/web",
    "flower-simulation": "tests/flower", "noise-multiplier": "tests/federated", "torchrun": "the tests of parallel training",
    "accelerate": "the tests of parallel training", "smartmops experts": "tests/surgery", "smartmops advise": "tests/surgery",
}  # fmt: skip
TRAINED = ["--steps", "2", "--batch-size", "4", "--samples-per-task", "0", "--dtype", "float32"]
SMALL = {
    "train": TRAINED, "compare": [*TRAINED, "--seeds", "0", "--shots", "1"],
    "federate": ["--rounds", "1", "--local-steps", "1", "--batch-size", "4", "--limit", "40", "--clients-per-round", "2", "--skip-empty",
                 "--dtype", "float32"],
    "generate": ["--max-new-tokens", "2"], "inspect": ["--max-new-tokens", "2"],
    "compress": ["--sequences", "2", "--sequence-length", "32"],
}  # fmt: skip
WORDS = {"MODEL": "tiny", "smollm2": "tiny", "DATA": "yours.jsonl", "big.jsonl": "yours.jsonl", "office": "yours.jsonl",
         "RUN": "runs/other", "DIR": "./kept"}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """One block of code of a page."""

    page: str
    language: str
    text: str

    @property
    def lines(self) -> list[str]:
        """Shell lines, without comments, continued ones joined."""
        text = re.sub(r"\\\n\s*", "", self.text)
        return [re.split(r"\s{2,}#|\s{3,}", line)[0].strip() for line in text.splitlines() if line.strip()]

    @property
    def synopsis(self) -> bool:
        """Whether it lists what can be typed rather than showing what to type."""
        return (
            bool(re.search(r"\[--|\.\.\.$", self.text, re.MULTILINE)) and self.page == "README.md" and not self.language
        )


@cache
def blocks() -> tuple[Block, ...]:
    """Of all pages."""
    return tuple(Block(page, *found) for page in PAGES for found in FENCED.findall((ROOT / page).read_text()))


def shell() -> Iterator[tuple[Block, str]]:
    """Each shell line of each page, in order."""
    for block in blocks():
        if block.language in ("", "bash", "sh") and not block.synopsis:
            yield from ((block, line) for line in block.lines)


@cache
def options(command: str) -> dict[str, list[str]]:
    """Options of a command, and the words that each takes if it takes only some."""
    kind = get_type_hints(cli.COMMANDS[command]).get("config")
    if kind is None:
        return {f"--{name}": [] for name in inspect.signature(cli.COMMANDS[command]).parameters}
    found: dict[str, list[str]] = {"--config": [], "--help": []}
    for each in (kind, *(own for option in described(kind) for _, own in subcommands(option.hint))):
        for option in described(each):
            flag, _, words = option.flag.partition(" ")
            found[flag] = re.findall(r"[\w.-]+", words) if words.startswith("{") else []
            found[typed(option.name)] = found[flag]
    return found


def small(line: str) -> list[str]:
    """The words behind `smartmops`, at a size for tests: a line's own sizes give way to ours."""
    command, *words = shlex.split(line[line.index("smartmops ") :].replace(" ... ", " MODEL --data DATA --out RUN "))[
        1:
    ]
    words = [WORDS.get(word, word) for word in words]
    for option in [each for each in SMALL.get(command, []) if each.startswith("--")]:
        if option in words:
            at = words.index(option)
            end = next((i for i in range(at + 1, len(words)) if words[i].startswith("--")), len(words))
            del words[at:end]
    return [command, *words, *SMALL.get(command, [])]


def elsewhere(line: str) -> str | None:
    """Where a line is run that is only parsed here."""
    return next((where for word, where in ELSEWHERE.items() if re.search(rf"(?<![\w.]){word}\b", line)), None)
