"""Answers on the terminal and from a file: `generate` and `chat`. Knows words, files and streams; knows no HTTP."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from smartmops.checks.folders import growing
from smartmops.data.asked import read_rows
from smartmops.options.finished.serving import AnswerConfig, ChatConfig, GenerateConfig
from smartmops.rows.example import Example

from .answering import Answer, Answerer, Settings

COMMANDS = "/expert NAME, /auto, /base, /new, /quit"
Write = Callable[[str], Any]
SHOWN = 0.005  # gate weights below this are not worth a word


def printed(text: str) -> None:
    """Write to standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def generate(config: GenerateConfig, write: Write = printed) -> list[dict[str, Any]]:
    """Answer TEXT, or each row of a file; the rows with their `answer`, its experts, and what was left to the base.

    Args:
        config: What to answer, and how.
        write: Takes what is answered, as it comes, unless it goes to a file.

    Raises:
        DataError: the file holds what is no row, a prompt does not fit the model, or the run has no experts.
        OSError: a file cannot be written; what was answered is kept beside it.
    """
    if config.file is None:
        row = {"instruction": config.text or "", "context": config.context}
        example, answerer = Example(row["instruction"], row["context"], ""), Answerer.open(config.run)
        return [row | _told(spoken(answerer, example, settings_of(config), write, **_who(config)))]
    rows, answerer = read_rows(config.file), Answerer.open(config.run)
    with nullcontext() if config.out is None else growing(config.out) as file:
        return [_line(row, write if file is None else file.write) for row in each_answered(answerer, rows, config)]


def _line(row: dict[str, Any], write: Write) -> dict[str, Any]:
    """The row, written as a line of JSON."""
    write(json.dumps(row, ensure_ascii=False) + "\n")
    return row


def each_answered(
    answerer: Answerer, rows: Sequence[tuple[dict[str, Any], Example]], config: GenerateConfig
) -> Iterator[dict[str, Any]]:
    """The rows with their answers, in order, a batch of any tasks at a time."""
    for start in range(0, len(rows), config.batch_size):
        some = rows[start : start + config.batch_size]
        settings = [replace(settings_of(config), seed=config.seed + start + i) for i in range(len(some))]
        questions = [answerer.ask(question, own, **_who(config))
                     for (_, question), own in zip(some, settings, strict=True)]  # fmt: skip
        for (row, _), answer in zip(some, answerer.answer(questions), strict=True):
            yield row | _told(answer)


def spoken(answerer: Answerer, example: Example, settings: Settings, write: Write, **who: Any) -> Answer:
    """Ask, write the answer as it comes, and then who answered."""
    (answer,) = answerer.answer([answerer.ask(example, settings, on_text=write, **who)])
    write(f"\n[{by(answer)}]\n")
    return answer


def by(answer: Answer) -> str:
    """The experts that answered with their weights, the strongest first."""
    named = sorted(answer.weights.items(), key=lambda pair: -pair[1])
    if answer.left_to_base > 0 or not named:
        named.append(("left to the base", answer.left_to_base))
    return ", ".join(f"{name} {weight:.2f}" for name, weight in named if weight >= SHOWN)


def settings_of(config: AnswerConfig) -> Settings:
    """How a command's options say that answers are chosen."""
    return Settings(config.max_new_tokens, config.temperature, config.top_p, config.seed)


def _who(config: GenerateConfig) -> dict[str, Any]:
    return {"expert": config.expert, "base": config.base}


def _told(answer: Answer) -> dict[str, Any]:
    return {"answer": answer.text, "experts": answer.weights, "left_to_base": answer.left_to_base}


class Chat:
    """A conversation: what was said, and who is to answer."""

    def __init__(self, answerer: Answerer, settings: Settings, write: Write) -> None:
        self.answerer, self.settings, self.write = answerer, settings, write
        self.history: tuple[tuple[str, str], ...] = ()
        self.who: dict[str, Any] = {}

    def hear(self, line: str) -> bool:
        """Take one line of the user; False: it was the last one."""
        line = line.strip()
        if line.startswith("/"):
            return self._command(*line.partition(" ")[::2])
        if line:
            self._answer(line)
        return True

    def _command(self, word: str, rest: str) -> bool:
        name = rest.strip()
        if word == "/expert" and name in self.answerer.experts:
            self.who = {"expert": name}
            self._say(f"{name} answers from now on")
        elif word == "/expert":
            self._say(f"{name or 'nobody'} is no expert of this run: choose {', '.join(self.answerer.experts)}")
        elif word == "/auto":
            self.who = {}
            self._say("the gate decides from now on")
        elif word == "/base":
            self.who = {"base": True}
            self._say("the frozen base answers from now on")
        elif word == "/new":
            self.history = ()
            self._say("a new conversation")
        elif word != "/quit":
            self._say(f"{word} is no command: choose {COMMANDS}")
        return word != "/quit"

    def _answer(self, line: str) -> None:
        try:
            example = Example(line, "", "", history=self.history)
            answer = spoken(self.answerer, example, self.settings, self.write, **self.who)
        except ValueError as error:
            self._say(f"{error}; or begin anew with /new")
            return
        if answer.text:
            self.history = (*self.history, (line, answer.text))

    def _say(self, words: str) -> None:
        self.write(f"[{words}]\n")


def chat(config: ChatConfig, lines: Iterable[str] | None = None, write: Write = printed) -> None:
    """Answer line after line, each with the turns before it, until /quit or the end of the input.

    Args:
        config: The run, and how answers are chosen.
        lines: What the user types; None: standard input.
        write: Takes what is answered, as it comes.
    """
    prompt = "> " if lines is None and sys.stdin.isatty() else ""
    talk = Chat(Answerer.open(config.run), settings_of(config), write)
    write(f"[experts: {', '.join(talk.answerer.experts)}; {COMMANDS}]\n{prompt}")
    for line in sys.stdin if lines is None else lines:
        if not talk.hear(line):
            break
        write(prompt)
