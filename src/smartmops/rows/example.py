"""The one record that passes between rooms, and how a conversation becomes such records. Text only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from smartmops.checks.errors import DataError, NoText

ROLES = ("system", "user", "assistant")
TEXTS = ("instruction", "context", "response", "category", "source", "system")


@dataclass(frozen=True)
class Example:
    """One supervised example of one task.

    Raises:
        NoText: a text is something else.
        DataError: a text holds half a character, as cut-off text from the web does: no tokenizer and no file takes it.
    """

    instruction: str
    context: str  # empty where the task has none
    response: str
    category: str = ""  # the task; empty where unknown
    source: str = ""  # who holds it: a client, a team, a file
    system: str = ""  # what an application says before the user does
    history: tuple[tuple[str, str], ...] = ()  # earlier turns: what the user said, what the assistant answered

    def __post_init__(self) -> None:
        try:
            texts = [getattr(self, name) for name in TEXTS] + [text for turn in self.history for text in turn]
            "".join(texts).encode()
        except TypeError:
            wrong = next((name for name in TEXTS if not isinstance(getattr(self, name), str)), "history")
            wanted = "pairs of question and answer" if wrong == "history" else "text"
            raise NoText(f"`{wrong}` is {str(getattr(self, wrong))[:40]!r}, not {wanted}: give that") from None
        except UnicodeEncodeError:
            for name, text in zip([*TEXTS, *["history"] * 2 * len(self.history)], texts, strict=True):
                _check_characters(name, text)

    def turns(self) -> list[Example]:
        """The earlier turns, as examples of their own, and this one."""
        return [*(Example(user, "", answer) for user, answer in self.history), self]


def conversation(messages: Sequence[Mapping[str, str]], category: str = "", source: str = "") -> list[Example]:
    """One example for each of the assistant's turns: what came before it is context, and only its own words are learnt.

    Args:
        messages: `role` (system, user or assistant) and `content` of each, as chat templates take them. A system
            message stands first, and users and assistant take turns.
        category: The task of all of them.
        source: Who holds them.

    Raises:
        DataError: no messages, an unknown role, turns out of order, an empty turn of the assistant, or an end with the
            user.
    """
    system, history, question = opened(messages)
    if question is not None:
        raise DataError(f"the conversation of {len(messages)} messages ends with the user ({question[:40]!r}), so "
                        "its last turn has nothing to learn: add the assistant's answer or leave it out")  # fmt: skip
    for number, message in enumerate(messages, 1):
        if message["role"] == "assistant" and not message["content"].strip():
            raise DataError(f"message {number} is an empty turn of the assistant, so nothing to learn: write one "
                            "or leave the turn out")  # fmt: skip
    return [Example(user, "", answer, category, source, system, history[:number])
            for number, (user, answer) in enumerate(history)]  # fmt: skip


def opened(messages: Sequence[Mapping[str, Any]]) -> tuple[str, tuple[tuple[str, str], ...], str | None]:
    """The system's text, finished turns, and what the user said last where nobody answered it yet.

    Turns of the assistant may be empty: an answer that was broken off is a part of the conversation too.

    Raises:
        DataError: as `conversation`, but for the end and empty turns.
    """
    system, history, question = "", list[tuple[str, str]](), None
    if not isinstance(messages, Sequence):
        raise NoText(f"messages={str(messages)[:40]!r} is no list of messages: write "
                     '[{"role": "user", "content": ...}]')  # fmt: skip
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise DataError(f"message {number} is {str(message)[:40]!r}, no object with role and content: write "
                            '[{"role": "user", "content": ...}]')  # fmt: skip
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise DataError(f"message {number} has role={role!r}: choose one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise DataError(f"message {number} has content={str(content)[:40]!r}, not text: write it in quotes")
        if role == "system" and number > 1:
            raise DataError(f"message {number} is the system's, which stands first or nowhere: move it to the start")
        if role == ("user" if question is not None else "assistant"):
            wanted = "assistant" if role == "user" else "user"
            raise DataError(f"message {number} is the {role}'s, but the {wanted}'s turn has come: users and assistant "
                            "take turns, so join what one of them says in a row")  # fmt: skip
        if role == "system":
            system = content
        elif role == "user":
            question = content
        elif question is not None:
            history, question = [*history, (question, content)], None
    if question is None and not history:
        raise DataError(f"{len(messages)} messages, and none of a user: give at least one")
    return system, tuple(history), question


def _check_characters(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise DataError(f"`{name}` holds {half} as character {error.start + 1}, which is half a character: write the "
                        "whole one or delete it") from error  # fmt: skip


def of_examples(*parts: Sequence[Any]) -> str:
    """What tells parts of data from any others, as 32 hexadecimal digits: all that each example says, in order."""
    total = blake2b(digest_size=16)
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        for each in part:
            total.update(repr(each).encode("utf-8", "backslashreplace"))
    return total.hexdigest()
