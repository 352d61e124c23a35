"""What the pages show: their blocks of code, the shell lines in them, and what each becomes at a size for tests."""

from __future__ import annotations

import argparse
import re
import shlex
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import tyro

from smartmops import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples/README.md", *(ROOT / "docs").glob("*.md"))
    if path.name != "commands.md"  # written from the parsers themselves
)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Parsed here, and run by the tests of their own rooms: they need other machines, processes, a GPU's time, or hours.
ELSEWHERE = {
    "quickstart": "tests/test_cli.py, at small size", "federate-server": "tests/deployment", "federate-client": "tests/deployment",
    "serve": "tests/serving; its client is run below", "reproduce": "tests/reproduce", "bench": "tests/bench",
    "flower-simulation": "tests/flower", "noise-multiplier": "tests/federated", "torchrun": "the tests of parallel training",
    "accelerate": "the tests of parallel training",
}  # fmt: skip
TRAINED = ["--steps", "2", "--batch-size", "4", "--samples-per-task", "0", "--dtype", "float32"]
SMALL = {
    "train": TRAINED, "compare": [*TRAINED, "--seeds", "0", "--shots", "1"],
    "federate": ["--rounds", "1", "--local-steps", "1", "--batch-size", "4", "--limit", "40", "--clients-per-round", "2",
                 "--dtype", "float32"],
    "generate": ["--max-new-tokens", "2"], "inspect": ["--max-new-tokens", "2"],
    "compress": ["--sequences", "2", "--sequence-length", "32"],
}  # fmt: skip
WORDS = {"MODEL": "tiny", "smollm2": "tiny", "DATA": "yours.jsonl", "big.jsonl": "yours.jsonl", "office": "yours.jsonl",
         "RUN": "runs/other", "DIR": "kept"}  # fmt: skip


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
        return bool(re.search(r"\[--|\.\.\.$", self.text, re.MULTILINE)) and self.page == "README.md"


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
def parser(command: str) -> argparse.ArgumentParser:
    """Of one command, which reads a line and runs nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return tyro.extras.get_parser(cli.COMMANDS[command], config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff))


@cache
def options(command: str) -> dict[str, list[str]]:
    """Options of a command, and the words that each takes if it takes only some."""
    return {option: list(map(str, action.choices or ())) for action in parser(command)._actions
            for option in action.option_strings}  # fmt: skip


def small(line: str) -> list[str]:
    """The words behind `smartmops`, at a size for tests: a line's own sizes give way to ours."""
    command, *words = shlex.split(line[line.index("smartmops ") :].replace(" ... ", " MODEL --data DATA --out RUN "))[1:]
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
