"""The columns that data come with, and the examples that their rows make. Knows columns; knows no files, no tokens."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smartmops.checks.errors import DataError
from smartmops.rows.example import Example, conversation
from smartmops.rows.faults import SHOWN, Faults, places, shown

log = logging.getLogger(__name__)

Columns = Mapping[str, str]  # what an example has -> the column of the data that holds it
CATEGORY = ("category", "task", "task_name")  # columns that may say which task a row belongs to
SOURCE = ("source", "client")
TALK = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")  # how a list of messages begins when it is text
CALLS = ("tool_calls", "function_call")  # what a message says beside its text
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
TOOLS = ("tools", "functions")  # what a chat may call, in a column of its own
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "developer": "system",
}  # fmt: skip


@dataclass(frozen=True)
class Form:
    """Columns that belong together.

    Attributes:
        name: As it is told.
        needed: Columns without which a row has another form.
        context: Columns that may hold the context, the first one that is there.
    """

    name: str
    needed: tuple[str, ...]
    context: tuple[str, ...] = ()

    @property
    def asked(self) -> str:
        """The column with the instruction."""
        return self.needed[0]

    @property
    def answered(self) -> str:
        """The column with the response."""
        return self.needed[-1]


CHATS = (Form("chat", ("messages",)), Form("chat", ("conversations",)))
TEXTS = (
    Form("instruction", ("instruction", "response"), ("context", "input")),
    Form("Alpaca", ("instruction", "output"), ("input", "context")),
    Form("prompt and completion", ("prompt", "completion"), ("context",)),
    Form("Super-NaturalInstructions", ("definition", "inputs", "targets"), ("inputs",)),
)


CELL = "a cell of CSV holds nothing but text, so write such data as JSONL, JSON or Parquet"


class EmptyResponse(DataError):
    """A row with nothing to learn."""


def examples_of(
    rows: Iterable[tuple[int, Any]], faults: Faults, chosen: Columns, task: str = "", *, leave_out_empty: bool = False
) -> Iterator[Example]:
    """One example a row, or one for each of the assistant's turns in a chat. The first good row says which form it is.

    Args:
        rows: With their numbers.
        faults: Where everything that is wrong with a row is noted.
        chosen: Columns that are called otherwise than in a form.
        task: Of rows without a category.
        leave_out_empty: Leave out, and count, rows with an empty response; else they are wrong.
    """
    reader, empty, count, unasked = _Reader(chosen, task, faults.unit), list[int](), 0, list[int]()
    for number, row in rows:
        try:
            found = reader.read(row)
        except ValueError as error:
            if leave_out_empty and isinstance(error, EmptyResponse):
                empty.append(number)
            else:
                faults.add(number, str(error))
            continue
        count += len(found)
        if not (found[0].instruction.strip() or found[0].context.strip()):
            unasked.append(number)
        yield from found
    _warn(faults, empty, "examples with an empty response left out")
    _warn(faults, unasked, "examples ask nothing: neither instruction nor context")
    if reader.form and not faults.count:
        log.info("%s: %d examples from %s rows, %s", faults.name, count, reader.form.name, reader.told)


def _warn(faults: Faults, numbers: Sequence[int], what: str) -> None:
    if numbers:
        named = places(faults.unit, list(numbers[:SHOWN])) + (", ..." if len(numbers) > SHOWN else "")
        log.warning("%s: %d %s (%s)", faults.name, len(numbers), what, named)


class _Reader:
    """Rows of one file to examples. What the first good row has, all have."""

    def __init__(self, chosen: Columns, task: str, unit: str) -> None:
        self.chosen, self.task = chosen, task
        self.way_out = "write it in quotes" if unit == "line" else "store the column as text"
        self.form: Form | None = None
        self.category: str | None = None  # a column that may hold the task, if there is one
        self.tasks: list[str] = []  # those of them that tasks come from; the first is asked first in every row
        self.passed = dict[str, str]()  # what says something else than the column that is taken, and how to take it

    @property
    def told(self) -> str:
        """Where the tasks come from, and what else they might have come from."""
        own = self.chosen.get("category")
        named = [own] if own else self.tasks or list(filter(None, [self.category]))
        alone = f"task `{self.task}`" if self.task else "no column of tasks"
        left = [f"`{other}` is not read{' in all rows' if other in named else ''} ({way})"
                for other, way in self.passed.items()]  # fmt: skip
        columns = f"tasks from column{'s' * (len(named) > 1)} " + " and ".join(f"`{name}`" for name in named)
        return ", ".join([columns if named else alone, *left])

    def read(self, row: Any) -> list[Example]:
        if not isinstance(row, dict):
            raise DataError(f'{shown(row)} is no object: write {{"instruction": ..., "response": ...}}')
        row = self._renamed(row)
        form = self.form or self._recognised(row)
        column = next((name for name in CATEGORY if name in row), None)
        if self.form and bool(column) != bool(self.category):
            problem = (
                f"no column `{self.category}`" if self.category else f"a column `{column}`, which rows before lack"
            )
            raise DataError(f"{problem} (found: {_names(row)}): give every row a category, or none")
        found = self._examples(form, row)
        self._check_alone(form, row, found)
        self.form, self.category = form, column
        self._note(row)
        return found

    def _check_alone(self, form: Form, row: Mapping[str, Any], found: Sequence[Example]) -> None:
        """Whether columns of another form say the same as those that were read, unless `--columns` chose these."""
        if set(form.needed) & self.chosen.keys():
            return
        for other in (*CHATS, *TEXTS):
            if other is form or not row.keys() >= set(other.needed) or other.answered == form.answered:
                continue
            try:
                answers = [each.response for each in self._examples(other, row)]
            except ValueError:
                continue  # it has no such form
            if {each.strip() for each in answers} - {each.response.strip() for each in found}:
                both, choice = f"`{form.answered}` and `{other.answered}`", f"{_choice(form)} or {_choice(other)}"
                raise DataError(f"{both} both hold an answer, and not the same: leave one out, or name the right one "
                                f"by --columns {choice}")  # fmt: skip

    def _examples(self, form: Form, row: Mapping[str, Any]) -> list[Example]:
        return self._chat(form, row) if form in CHATS or _is_talk(form, row) else [self._text(form, row)]

    def _renamed(self, row: dict[str, Any]) -> dict[str, Any]:
        if missing := [f"{field}={column}" for field, column in self.chosen.items() if column not in row]:
            raise DataError(f"--columns {' '.join(missing)}: no such column (found: {_names(row)})")
        left = {name: value for name, value in row.items() if name not in self.chosen.values()}
        return left | {field: row[column] for field, column in self.chosen.items()}

    def _recognised(self, row: Mapping[str, Any]) -> Form:
        """The form that has the chosen columns if any, else the first whose columns are there."""
        every = sorted((*CHATS, *TEXTS), key=lambda form: not set(form.needed) & self.chosen.keys())
        for form in every:
            if row.keys() >= set(form.needed):
                return form
        nearest = max(every, key=lambda form: len(row.keys() & set(form.needed)))
        missing = [name for name in nearest.needed if name not in row]
        problem = f"no column `{missing[0]}`" if len(missing) < len(nearest.needed) else "no columns that are known"
        raise DataError(f"{problem} (found: {_names(row)}). Needed are instruction and response, instruction and "
                        "output, prompt and completion, messages or conversations; optional are context, category, "
                        "source. Other names: --columns instruction=... response=...")  # fmt: skip

    def _text(self, form: Form, row: Mapping[str, Any]) -> Example:
        for name in form.needed:
            if name not in row:
                raise DataError(f"no column `{name}` (found: {_names(row)}). Needed are {' and '.join(form.needed)}")
        if _is_talk(form, row, str):
            raise DataError(f"`prompt` and `completion` are lists of messages written as text: {CELL}")
        context = self._context(form, row)
        asked, given, response = (self._words(row, name) for name in (form.asked, context, form.answered))
        task, source = self._label(row, CATEGORY) or self.task, self._label(row, SOURCE)
        example = Example(asked, given, response, task, source, self._words(row, "system"), history_of(row))
        if not response.strip():
            raise EmptyResponse(f"empty `{form.answered}`, so nothing to learn: write one or delete the line")
        return example

    def _context(self, form: Form, row: Mapping[str, Any]) -> str:
        """The column with the context: of those there are, the one that says something."""
        there = [name for name in form.context if name in row]
        filled = [name for name in there if row[name] not in (None, "")]
        if len(filled) > 1 and "context" not in self.chosen:
            raise DataError(f"`{filled[0]}` and `{filled[1]}` both say something, and one is the context: join them, "
                            f"or name the right one by --columns context={filled[0]}")  # fmt: skip
        return "context" if "context" in self.chosen else next(iter((*filled, *there)), "context")

    def _chat(self, form: Form, row: Mapping[str, Any]) -> list[Example]:
        """All turns of the assistant that are to be learnt; where prompt and completion are messages, the latter's."""
        parts = [messages_of(row, name) for name in form.needed]
        given = [message for part in parts for message in part]
        if (system := self._words(row, "system")) and given and given[0]["role"] != "system":
            given.insert(0, {"role": "system", "content": system})
        found = conversation(given, self._label(row, CATEGORY) or self.task, self._label(row, SOURCE))
        before = sum(message["role"] == "assistant" for part in parts[:-1] for message in part)
        learnt = [message["learnt"] for part in parts for message in part if message["role"] == "assistant"]
        if not any(learnt[before:]):
            raise EmptyResponse(f"`{form.answered}` has no turn of the assistant that is to be learnt")
        return [each for number, each in enumerate(found) if number >= before and learnt[number]]

    def _words(self, row: Mapping[str, Any], column: str) -> str:
        value = row.get(column)
        if value is None or isinstance(value, str):
            return value or ""
        raise DataError(f"`{column}` is {shown(value)}, not text: {self.way_out}")

    def _label(self, row: Mapping[str, Any], columns: Sequence[str]) -> str:
        """What the first column that says something says; nothing where none does."""
        return next(iter(self._said(row, columns).values()), "")

    def _said(self, row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, str]:
        """What each column says that says something, the one that is read first; others need not hold text."""
        first = self.tasks[:1] if columns is CATEGORY else []
        said = dict[str, str]()
        for name in dict.fromkeys((*first, *columns[: 1 if columns[0] in self.chosen else None])):
            if row.get(name) is None:
                continue
            try:
                word = self._name(row, name)
            except DataError:
                if not said:
                    raise
                continue
            said |= {name: word} if word else {}
        return said

    def _note(self, row: Mapping[str, Any]) -> None:
        """Keep where a good row has its names from, and what else says otherwise."""
        for columns in (CATEGORY, SOURCE):
            said = self._said(row, columns)
            column = next(iter(said), "")
            if column and columns is CATEGORY and column not in self.tasks:
                self.tasks.append(column)
            self.passed |= {name: f"--columns {columns[0]}={name} takes it in place of `{column}`"
                            for name, word in said.items() if word != said[column]}  # fmt: skip

    def _name(self, row: Mapping[str, Any], column: str) -> str:
        """A name, for which numbers are taken too; nothing where it is blank."""
        value = row[column]
        found = str(value) if isinstance(value, int) and not isinstance(value, bool) else self._words(row, column)
        return found if found.strip() else ""


def _choice(form: Form) -> str:
    return f"{'messages' if form in CHATS else 'response'}={form.answered}"


def _is_talk(form: Form, row: Mapping[str, Any], kind: type = list) -> bool:
    """Whether prompt and completion are lists of messages, as TRL has them, or such lists written as text."""
    values = [row.get(name) for name in form.needed]
    if form.needed != ("prompt", "completion") or not all(isinstance(value, kind) for value in values):
        return False
    return kind is list or all(TALK.match(value) for value in values if isinstance(value, str))


def messages_of(row: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    """Messages as `conversation` takes them: ShareGPT writes `from` and `value`, OpenAI may write parts of a text.

    `learnt` is False of a turn that is to be read and not learnt (`weight` 0, `loss` or `train` false).
    """
    value = row.get(column)
    if named := next((name for name in TOOLS if row.get(name) not in (None, "", "[]", [], {})), None):
        raise DataError(f"a chat with `{named}`, and calls are not read: write them into the system's text, or leave "
                        "the column out")  # fmt: skip
    if isinstance(value, str):
        raise DataError(f"`{column}` is text, not a list of messages: {CELL}")
    if not isinstance(value, list):
        raise DataError(f"`{column}` is {shown(value)}, not a list of messages: write "
                        '[{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]')  # fmt: skip
    return [_message(message, f"message {number} of `{column}`") for number, message in enumerate(value, 1)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError(f"{where} is {shown(message)}, no object with role and content")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if not isinstance(role, str):
        raise DataError(f"{where} has {shown(role)} for a role: choose system, user or assistant")
    if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    if content is None or not isinstance(content, str):
        raise DataError(f"{where} has content={shown(content)}, not text: only text is read")
    if called := next((name for name in CALLS if message.get(name)), None):
        raise DataError(f"{where} has {called}, and calls are not read: write the call as text, or leave the "
                        "conversation out")  # fmt: skip
    if thought := next((name for name in THOUGHTS if message.get(name)), None):
        raise DataError(f"{where} has {thought}, and thoughts are not read: write them into the content, or leave "
                        "them out")  # fmt: skip
    return {"role": ROLES.get(role, role)[:40], "content": content, "learnt": _is_learnt(message, where)}


def _is_learnt(message: Mapping[str, Any], where: str) -> bool:
    """What a message says of whether it is to be learnt: OpenAI's `weight`, or `loss` and `train` of other trainers."""
    said = {name: value for name in ("weight", "loss", "train") if (value := message.get(name)) is not None}
    for name, value in said.items():
        if value not in (0, 1):
            raise DataError(f"{where} has {name}={shown(value)}: write 1 (or true) to learn it, 0 (or false) to read "
                            "it alone")  # fmt: skip
    return all(said.values())


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def history_of(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Earlier turns: what was asked, and what was answered."""
    value = row.get("history") or []
    pairs = isinstance(value, list) and all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in value)
    if not pairs or not all(isinstance(text, str) for turn in value for text in turn):
        raise DataError(f"`history` is {shown(value)}, no list of pairs: write [[question, answer], ...]; {CELL}")
    return tuple((user, answer) for user, answer in value)


def _names(row: Mapping[str, Any]) -> str:
    named = ", ".join(name if name.isprintable() else ascii(name)[1:-1] for name in map(str, row))
    return (named if len(named) <= 200 else f"{named[:197]}...") or "none"
