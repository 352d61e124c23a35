"""Messages to examples, one for each of the assistant's turns, and what is no conversation."""

from __future__ import annotations

import pytest

from smartmops.rows import Example, conversation


def said(*pairs: tuple[str, object]) -> list[dict[str, object]]:
    return [{"role": role, "content": content} for role, content in pairs]


def test_each_answer_is_an_example_of_its_own() -> None:
    messages = said(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert conversation(messages, "task", "team") == [
        Example("a", "", "b", "task", "team", "s"),
        Example("c", "", "d", "task", "team", "s", (("a", "b"),)),
    ]
    assert conversation(messages[1:3]) == [Example("a", "", "b")]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (said(("user", "a"), ("assistant", "b"), ("user", "why so")), r"3 messages ends with the user \('why so'\)"),
        (said(("user", "a"), ("assistant", " \n")), "message 2 is an empty turn of the assistant"),
        (said(("user", "a"), ("robot", "b")), "message 2 has role='robot': choose one of system, user, assistant"),
        (said(("user", "a"), ("user", "b")), "message 2 is the user's, but the assistant's turn has come"),
        (said(("assistant", "a")), "message 1 is the assistant's, but the user's turn has come"),
        (said(("user", "a"), ("system", "b")), "message 2 is the system's, which stands first or nowhere"),
        (said(("user", 3)), "message 1 has content='3', not text"),
        (said(("system", "s")), "1 messages, and none of a user"),
        ([], "0 messages, and none of a user"),
    ],
)
def test_what_is_no_conversation(messages: list[dict[str, object]], problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as found:
        conversation(messages)
    assert "\n" not in str(found.value)
