"""Options of the commands that answer: `generate`, `chat` and `serve`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from smartmops.checks.folders import Existing, OutFile, beside
from smartmops.checks.limits import Count, NotNegative, Number, Options, Positive, Seed, Text, listed, unused

from .reading import RunFolder

AnyPort = Annotated[int, Number("0 to 65535 (0: any that is free)", 0, 65535)]
TopP = Annotated[float, Number("a share above 0 and at most 1, such as 0.9", 0, 1, above=True)]
Run = Annotated[Path, RunFolder(), tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
KEYS = "a file with one key a line"


@dataclass(frozen=True)
class Keys:
    """A file with keys of clients, one a line."""

    def wrong(self, value: Path) -> str | None:
        """As `limits.Limit`."""
        if (said := Existing(KEYS).wrong(value)) is not None:
            return said
        try:
            found = keys_in(value)
        except (OSError, UnicodeDecodeError):
            return f" cannot be read: give {KEYS}"
        return None if found else f" holds no key: give {KEYS}"


def keys_in(file: Path) -> list[str]:
    """The keys of a file, without blank lines and comments, which begin with #."""
    lines = map(str.strip, file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def experts_of(run: Path) -> list[str]:
    """Names of a run's experts, by number where it gave none; empty where its adapter has none."""
    found = adapter_config(run)
    try:
        return list(found.get("expert_names") or [f"expert {i}" for i in range(found.get("num_experts") or 0)])
    except TypeError:
        return []  # who loads it says what is wrong


def adapter_config(run: Path) -> dict[str, Any]:
    """What a run's adapter says of itself; empty where it cannot be read (who loads it says why)."""
    try:
        found = json.loads((run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


@dataclass(kw_only=True)
class AnswerConfig(Options):
    """How answers are chosen."""

    max_new_tokens: Count = 256  # largest number of tokens of an answer
    temperature: NotNegative = 0.0  # 0: always the most likely token; above 0: tokens are sampled
    top_p: TopP = 1.0  # sample among the most likely tokens that together have this probability
    seed: Seed = 0  # seed of sampling

    def idle(self) -> Iterator[str]:
        """As `Options`."""
        yield from unused(self, ("top_p", "seed"), self.temperature > 0, "is of tokens that are sampled, and at "
                          "--temperature 0 none are: give one above 0, or leave it away")  # fmt: skip


@dataclass(kw_only=True)
class GenerateConfig(AnswerConfig):
    """Answer one instruction, or each row of a file."""

    run: Run  # run folder
    text: Annotated[
        Annotated[str, Text("an instruction")] | None, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")
    ] = None  # instruction to answer
    context: str = ""  # text that the instruction refers to
    file: Annotated[Path, Existing("a JSONL file")] | None = None
    """JSONL file of questions, in the columns that `train` reads, answered in place of TEXT"""
    out: OutFile | None = None  # JSONL file for the rows of --file with their answers; by default they are printed
    batch_size: Count = 16  # rows of --file that are answered at once
    expert: Annotated[str, Text("an expert's name")] | None = None  # expert to answer with; by default the gate decides
    base: bool = False  # answer with the frozen base, without experts

    def problems(self) -> Iterator[str]:
        """Whether there is one thing to answer, by one side, and such an expert."""
        if self.text is None and self.file is None:
            yield "neither TEXT nor --file is given: give one of them"
        if self.text is not None and self.file is not None:
            yield f"TEXT and --file {self.file} are both given: give one of them"
        if self.context and self.file is not None:
            yield f"--context goes with TEXT, and --file {self.file} has a context in each row: leave it away"
        if self.out is not None and self.file is None:
            yield f"--out {self.out} is for the answers of --file: give that, or leave --out away"
        if self.out is not None and self.file is not None and self.out.resolve() == self.file.resolve():
            yield f"--out {self.out} is the file that is answered: choose another name"
        if self.out is not None and (begun := beside(self.out.resolve())).exists():
            yield (f"--out {self.out}: {begun} holds the answers of a command that was broken off: move it away, or "
                   "delete it, unless one is writing it now")  # fmt: skip
        if self.base and self.expert is not None:
            yield f"--expert {self.expert} and --base are both asked for: choose one"
        if self.expert is not None and self.expert not in (names := experts_of(self.run)):
            has = f"is no expert of {self.run}: choose {listed(names)}" if names else f"but {self.run} has no experts"
            yield f"--expert {self.expert} {has}"

    def idle(self) -> Iterator[str]:
        """As `Options`."""
        yield from super().idle()
        yield from unused(self, ("batch_size",), self.file is not None,
                          "is of the rows of --file: give that, or leave it away")  # fmt: skip


@dataclass(kw_only=True)
class ChatConfig(AnswerConfig):
    """Talk with a run on the terminal."""

    run: Run  # run folder


@dataclass(kw_only=True)
class ServeConfig(Options):
    """Answer HTTP requests in OpenAI's form."""

    run: Run  # run folder
    host: Annotated[str, Text("an address of this machine")] = "127.0.0.1"
    """address to listen on; others than 127.0.0.1 can be reached from outside"""
    port: AnyPort = 8000  # 0: any that is free
    api_key_file: Annotated[Path, Keys()] | None = (
        None  # file with one key a line (# begins a comment), one of which a client sends; none is needed by default
    )
    queue: Count = 64  # answers that may wait; more are refused with status 429
    batch_size: Count = 16  # answers that are generated at once
    max_tokens: Count = 512  # that one answer may have, and has at most where a request does not say
    request_timeout: Positive = 600.0  # seconds that one request may take, waiting included, before it is given up
