"""Questions of both tasks that the tests ask."""

from __future__ import annotations

from dataclasses import replace

from smartmops.rows.example import Example
from smartmops.serving.answering import Answerer, Question, Settings

SHORT, LONG = Example("apple number 3.", "", ""), Example("banana number 4, and much more of it.", "A text.", "")
TALK = Example("And now?", "", "", system="Be brief.", history=(("apple number 1.", "AAAA"),))
GREEDY = Settings(max_new_tokens=12)


def mixed(answerer: Answerer, settings: Settings = GREEDY) -> list[Question]:
    """Questions of both tasks, to the gate, to each expert and to the base."""
    return [
        answerer.ask(SHORT, settings), answerer.ask(LONG, replace(settings, max_new_tokens=5), expert="apple"),
        answerer.ask(SHORT, settings, expert="banana"), answerer.ask(TALK, settings, base=True),
        answerer.ask(LONG, settings), answerer.complete("apple is", settings),
    ]  # fmt: skip
