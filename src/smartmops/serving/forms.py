"""OpenAI's JSON in, questions out; answers in, OpenAI's JSON out. Knows fields and their limits; knows no HTTP server.

A field that would change the answer and is not known here is refused with a word, never ignored.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

from smartmops.checks.errors import DataError
from smartmops.checks.limits import AUTO, BASE
from smartmops.rows.example import Example, opened
from smartmops.rows.faults import shown

from .answering import Answer, Answers, Question, Settings

HALF = "\ufffd"  # stands for bytes that are no whole character
TEMPERATURES, STOPS, CHOICES = 2.0, 4, 16  # the most that a request may ask for
LIKELY, LIKELY_OF_TEXT = 20, 5  # most tokens to tell beside each one, in chats and in completions
TOLERANCE = 0.01  # that shares of experts, which people round, may be away from one
OURS = {"model", "max_tokens", "temperature", "top_p", "seed", "stop", "n", "stream", "stream_options", "logprobs",
        "gate_weights"}  # fmt: skip
CHAT, COMPLETION = {"messages", "max_completion_tokens", "top_logprobs"}, {"prompt"}
IGNORED = {"user", "metadata", "store", "safety_identifier"}  # say nothing of the answer
# What can be said of these and changes nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "top_logprobs": (0,),
    "logit_bias": ({},), "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "echo": (False,), "best_of": (1,), "suffix": ("",), "modalities": (["text"],), "parallel_tool_calls": (True, False),
}  # fmt: skip


class Refused(Exception):
    """A request that is not answered, as OpenAI says so."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.retry = status, retry
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Wanted:
    """A request that is understood."""

    model: str
    chat: bool
    questions: list[Question]
    each: int  # answers to each prompt, whose questions stand one after the other
    stream: bool
    usage: bool  # whether a stream ends with the counts of tokens


def models(answerer: Answers) -> list[str]:
    """What can be asked for as `model`."""
    return [AUTO, BASE, *(name for name in answerer.experts if name not in (AUTO, BASE))]


def understood(body: Any, chat: bool, answerer: Answers, most: int, room: int) -> Wanted:
    """What a request wants.

    Args:
        body: Its JSON.
        chat: Whether it came to `/v1/chat/completions`.
        answerer: Who would answer.
        most: Tokens that one answer may have.
        room: Answers that one request may ask for.

    Raises:
        Refused: it cannot be answered.
    """
    if not isinstance(body, dict):
        raise Refused(400, f"the body is {shown(body)}: send a JSON object")
    _check_fields(body, chat)
    model = _model(body, answerer)
    who: dict[str, Any] = {"base": model == BASE, "expert": None if model in (AUTO, BASE) else model}
    if (weights := _weights(body, answerer, model)) is not None:
        who["weights"] = weights
    settings = replace(_settings(body, most), logprobs=_logprobs(body, chat))
    count = _whole(body, "n", 1, CHOICES) or 1
    param = "messages" if chat else "prompt"
    asked = [_example(body.get(param))] if chat else _texts(body.get(param))
    if len(asked) * count > room:
        raise Refused(400, f"{len(asked) * count} answers are asked for: choose {room} at most", "n" if chat else param)
    questions = []
    for number in range(len(asked) * count):
        own = replace(settings, seed=(settings.seed + number) % 2**32)
        what = asked[number // count]
        try:
            ask = partial(answerer.ask, what) if isinstance(what, Example) else partial(answerer.complete, what)
            questions.append(ask(own, **who))
        except ValueError as error:
            code = "context_length_exceeded" if "positions" in str(error) else None
            raise Refused(400, str(error), param, code) from error
    options = body.get("stream_options") or {}
    return Wanted(model, chat, questions, count, bool(_flag(body, "stream")), bool(_flag(options, "include_usage")))


def _check_fields(body: Mapping[str, Any], chat: bool) -> None:
    known = OURS | IGNORED | (CHAT if chat else COMPLETION)
    for name, value in body.items():
        if name in known or value is None:
            continue
        if name not in NEUTRAL:
            raise Refused(400, f"{shown(name)} is no field that is known here: leave it out", name, "unknown_parameter")
        alike = [neutral for neutral in NEUTRAL[name] if isinstance(neutral, bool) == isinstance(value, bool)]
        if value not in alike:
            raise Refused(
                400, f"{name} is {shown(value)}, and is not supported: leave it out", name, "unsupported_value"
            )
    options = body.get("stream_options")
    if options is not None and (not isinstance(options, dict) or set(options) - {"include_usage"}):
        raise Refused(400, f"stream_options is {shown(options)}: choose include_usage alone", "stream_options")


def _model(body: Mapping[str, Any], answerer: Answers) -> str:
    model, known = body.get("model"), models(answerer)
    if not isinstance(model, str):
        raise Refused(400, f"model is {shown(model)}: choose one of {', '.join(known)}", "model")
    if model not in known:
        raise Refused(
            404, f"there is no model {shown(model)}: choose one of {', '.join(known)}", "model", "model_not_found"
        )
    return model


def _settings(body: Mapping[str, Any], most: int) -> Settings:
    if body.get("max_tokens") is not None and body.get("max_completion_tokens") is not None:
        raise Refused(400, "max_tokens and max_completion_tokens are both given: choose one", "max_tokens")
    tokens = _whole(body, "max_tokens", 1, most) or _whole(body, "max_completion_tokens", 1, most) or most
    temperature = _number(body, "temperature", 0.0, TEMPERATURES)
    top_p = _number(body, "top_p", 0.0, 1.0)
    if top_p == 0:
        raise Refused(400, "top_p is 0: choose a number above 0 and at most 1, or temperature 0", "top_p")
    seed = _whole(body, "seed", 0, 2**32 - 1)
    drawn = int.from_bytes(uuid.uuid4().bytes[:4]) if seed is None else seed
    return Settings(tokens, temperature or 0.0, 1.0 if top_p is None else top_p, drawn, _stops(body.get("stop")))


def _logprobs(body: Mapping[str, Any], chat: bool) -> int | None:
    if not chat:
        asked = body.get("logprobs")
        return None if asked is False else _whole(body, "logprobs", 0, LIKELY_OF_TEXT)
    wanted, count = _flag(body, "logprobs"), _whole(body, "top_logprobs", 0, LIKELY)
    if count and not wanted:
        raise Refused(400, f"top_logprobs is {count} without logprobs: set that to true, too", "top_logprobs")
    return count or 0 if wanted else None


def _weights(body: Mapping[str, Any], answerer: Answers, model: str) -> tuple[float, ...] | None:
    """Shares of the experts by name, which take the place of the gate's; experts that are not named get none."""
    value = body.get("gate_weights")
    if value is None:
        return None
    if model != AUTO:
        raise Refused(400, f"gate_weights go with model {AUTO}, and model is {model}: choose one", "gate_weights")
    if not isinstance(value, dict) or (unknown := sorted(set(value) - set(answerer.experts))):
        what = shown(unknown[0]) + " is no expert" if isinstance(value, dict) else f"gate_weights is {shown(value)}"
        raise Refused(400, f"{what}: give an object with shares of {', '.join(answerer.experts)}", "gate_weights")
    found = [_number(value, name, 0.0, 1.0) or 0.0 for name in answerer.experts]
    if abs(sum(found) - 1) > TOLERANCE:
        raise Refused(400, f"gate_weights sum to {sum(found):g}: give shares that sum to 1", "gate_weights")
    return tuple(each / sum(found) for each in found)


def _stops(value: Any) -> tuple[str, ...]:
    found = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(found, list) or len(found) > STOPS or not all(isinstance(each, str) and each for each in found):
        raise Refused(400, f"stop is {shown(value)}: give a text, or at most {STOPS} in a list", "stop")
    return tuple(found)


def _whole(body: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # JSON has one kind of number
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high):
        raise Refused(400, f"{name} is {shown(value)}: choose a whole number from {low} to {high}", name)
    return value


def _number(body: Mapping[str, Any], name: str, low: float, high: float) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high or not math.isfinite(value):
        raise Refused(400, f"{name} is {shown(value)}: choose a number from {low:g} to {high:g}", name)
    return float(value)


def _flag(body: Mapping[str, Any], name: str) -> bool | None:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refused(400, f"{name} is {shown(value)}: choose true or false", name)
    return value


def _example(messages: Any) -> Example:
    """A conversation that ends with the user."""
    if not isinstance(messages, list) or not messages:
        raise Refused(400, f"messages is {shown(messages)}: give a list with at least one message", "messages")
    try:
        system, history, question = opened([_message(number, each) for number, each in enumerate(messages, 1)])
        if question is None:
            raise DataError("the last message is the assistant's: end with one of the user")
        return Example(question, "", "", system=system, history=history)
    except ValueError as error:
        raise Refused(400, str(error), "messages") from error


def _message(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError(f"message {number} is {shown(message)}: give an object with role and content")
    if unknown := sorted(
        str(name) for name in message if name not in ("role", "content") and message[name] is not None
    ):
        raise DataError(f"message {number} has {unknown[0]}, which is not supported: leave it out")
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):
        parts = [
            each.get("text") if isinstance(each, dict) and each.get("type") == "text" else None for each in content
        ]
        if not parts or not all(isinstance(part, str) for part in parts):
            raise DataError(f"message {number} holds parts that are no text: give parts of type text alone")
        content = "".join(str(part) for part in parts)
    return {"role": "system" if role == "developer" else role, "content": content}


def _texts(prompt: Any) -> list[str]:
    found = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(found, list) or not found or not all(isinstance(each, str) for each in found):
        raise Refused(400, f"prompt is {shown(prompt)}: give a text, or several in a list", "prompt")
    try:
        "".join(found).encode()
    except UnicodeEncodeError as error:
        raise Refused(400, "prompt holds half a character: write the whole one or delete it", "prompt") from error
    return found


class Reply:
    """The JSON of one request's answers."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted, self.created = wanted, int(time.time())
        self.id = f"{'chatcmpl' if wanted.chat else 'cmpl'}-{uuid.uuid4().hex}"

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """All answers at once."""
        kind = "chat.completion" if self.wanted.chat else "text_completion"
        choices = [self._choice(index, each) for index, each in enumerate(answers)]
        return self._head(kind) | {"choices": choices, "usage": self.usage(answers)}

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says of an answer before its first words."""
        return self._chunk(index, {"role": "assistant", "content": ""}) if self.wanted.chat else None

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """Some words of an answer."""
        return self._chunk(index, {"content": text} if self.wanted.chat else text)

    def closing(self, index: int, answer: Answer) -> dict[str, Any]:
        """How an answer ended, and who gave it."""
        found = self._chunk(index, {} if self.wanted.chat else "")
        told = {"finish_reason": answer.ended, "experts": experts(answer), "logprobs": self._likely(answer)}
        found["choices"][0] |= told
        return found

    def counted(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The last words of a stream, where counts are asked for."""
        return self._head(self._streamed) | {"choices": [], "usage": self.usage(answers)}

    def usage(self, answers: Sequence[Answer]) -> dict[str, int]:
        """Tokens of prompts, each counted once however many answers it has, and of answers."""
        read = sum(len(one.prompt.input_ids) for one in self.wanted.questions[:: self.wanted.each])
        written = sum(answer.tokens for answer in answers)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    @property
    def _streamed(self) -> str:
        return "chat.completion.chunk" if self.wanted.chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.wanted.model}

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        said: dict[str, Any] = {"text": answer.text}
        if self.wanted.chat:
            said = {"message": {"role": "assistant", "content": answer.text}}
        return {"index": index, **said, "logprobs": self._likely(answer), "finish_reason": answer.ended,
                "experts": experts(answer)}  # fmt: skip

    def _likely(self, answer: Answer) -> dict[str, Any] | None:
        if answer.likely is None:
            return None
        if self.wanted.chat:
            return {"content": [_told(each.token, each.logprob) | {"top_logprobs": [_told(*top) for top in each.top]}
                                for each in answer.likely], "refusal": None}  # fmt: skip
        starts = accumulate((len(each.token) for each in answer.likely), initial=0)
        return {
            "tokens": [each.token for each in answer.likely],
            "token_logprobs": [each.logprob for each in answer.likely],
            "top_logprobs": [dict(each.top) for each in answer.likely],
            "text_offset": list(starts)[: len(answer.likely)],
        }

    def _chunk(self, index: int, said: Any) -> dict[str, Any]:
        name = "delta" if self.wanted.chat else "text"
        choice = {"index": index, name: said, "logprobs": None, "finish_reason": None}
        return self._head(self._streamed) | {"choices": [choice]}


def _told(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": None if HALF in token else list(token.encode())}


def experts(answer: Answer) -> dict[str, Any]:
    """Who answered."""
    return {"weights": answer.weights, "left_to_base": answer.left_to_base}
