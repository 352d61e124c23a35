"""The OpenAPI document of a server: its paths, what they take, and what comes back. Knows fields and their limits.

What a schema cannot say (shares that sum to one, a prompt that fits the model) is in its description, and is answered
with status 400.
"""

from __future__ import annotations

from typing import Any

from smartmops.checks.limits import AUTO
from smartmops.serving.answering import Answers
from smartmops.serving.forms import CHOICES, IGNORED, LIKELY, LIKELY_OF_TEXT, NEUTRAL, STOPS, TEMPERATURES, models
from smartmops.settings.writing import version_of

from .bodies import Limits

Schema = dict[str, Any]
SEEDS = 2**32 - 1  # the largest seed


def document(answerer: Answers, most: int, limits: Limits, guarded: bool) -> Schema:
    """The document of what serves `answerer`.

    Args:
        answerer: Who answers.
        most: Tokens that one answer may have.
        limits: What a client may take.
        guarded: Whether a key is needed.
    """
    schemas = {**_requests(answerer, most), **_replies(models(answerer))}
    components: Schema = {"schemas": schemas}
    if guarded:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "smartmops",
            "version": version_of("smartmops", "0"),
            "description": "A mixture of prompts that answers.",
        },
        "paths": _paths(limits, guarded),
        "components": components,
    }


def _paths(limits: Limits, guarded: bool) -> Schema:
    def asked(name: str, says: str, reply: str, chunk: str) -> Schema:
        content = {"application/json": {"schema": _ref(reply)}, "text/event-stream": {"schema": _stream(chunk)}}
        body = {"required": True, "content": {"application/json": {"schema": _ref(f"{name}Request")}}}
        responses = {"200": {"description": "the answers", "content": content}, **_errors(limits, guarded)}
        return {"post": {"operationId": name, "summary": says, "requestBody": body, "responses": responses} | keyed}

    def told(name: str, says: str, schema: Schema, kind: str = "application/json", key: bool = False) -> Schema:
        responses: Schema = {"200": {"description": says, "content": {kind: {"schema": schema}}}}
        if key and guarded:
            responses["401"] = _error("no valid key came with the request")
        return {"get": {"operationId": name, "summary": says, "responses": responses} | (keyed if key else {})}

    keyed: Schema = {"security": [{"key": []}]} if guarded else {}
    health = told("health", "whether the server answers", _ref("Health"))
    health["get"]["responses"]["503"] = {"description": "the server is shutting down", "content": {
        "application/json": {"schema": _ref("Health")}}}  # fmt: skip
    text = {"type": "string"}
    return {
        "/v1/chat/completions": asked("chat", "answer in the run's template", "ChatReply", "ChatChunk"),
        "/v1/completions": asked("completion", "go on with a text", "CompletionReply", "CompletionChunk"),
        "/v1/models": told("models", "what can be asked for", _ref("Models"), key=True),
        "/health": health,
        "/metrics": told("metrics", "counts, as Prometheus reads them", text, "text/plain"),
        "/": told("playground", "a page to ask from", text, "text/html"),
        "/openapi.json": told("openapi", "this document", {"type": "object"}, key=True),
    }


def _errors(limits: Limits, guarded: bool) -> Schema:
    """Statuses of a request that is not answered."""
    keys = {"401": _error("no valid key came with the request")} if guarded else {}
    busy = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
    return keys | {
        "400": _error("the request cannot be answered; the message says why, and what can"),
        "404": _error("there is no such model"),
        "408": _error(f"the body did not come within {limits.reading:g} s"),
        "413": _error(f"the body has more than {limits.body} bytes"),
        "429": _error("as many answers wait as may wait") | {"headers": busy},
        "500": _error("the model failed"),
        "503": _error("the server is shutting down") | {"headers": busy},
        "504": _error(f"the answer has not ended within {limits.answer:g} s") | {"headers": busy},
    }


def _error(says: str) -> Schema:
    return {"description": says, "content": {"application/json": {"schema": _ref("Error")}}}


def _stream(chunk: str) -> Schema:
    return {"type": "string", "description": f"server-sent events with a {chunk} each, or an Error; after the last one "
            "`data: [DONE]`"}  # fmt: skip


def _requests(answerer: Answers, most: int) -> Schema:
    names, experts = models(answerer), list(answerer.experts)
    shared: Schema = {
        "model": {"enum": names, "description": f"{AUTO}: the gate decides; base: no expert answers; or an expert"},
        "max_tokens": _or_null(_whole(1, most)),
        "temperature": _or_null({"type": "number", "minimum": 0, "maximum": TEMPERATURES}),
        "top_p": _or_null({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
        "seed": _or_null(_whole(0, SEEDS)),
        "n": _or_null(_whole(1, CHOICES)),
        "stop": {"anyOf": [{"type": ["string", "null"], "minLength": 1},
                           {"type": "array", "maxItems": STOPS, "items": {"type": "string", "minLength": 1}}]},
        "stream": {"type": ["boolean", "null"]},
        "stream_options": _or_null(_object({"include_usage": {"type": ["boolean", "null"]}}, [])),
        "gate_weights": _or_null(_object(
            {name: _or_null({"type": "number", "minimum": 0, "maximum": 1}) for name in experts}, [],
        )) | {"description": f"shares of the experts that take the place of the gate's, with model {AUTO}; sum to 1"},
    }  # fmt: skip
    shared |= {name: {} for name in sorted(IGNORED)}
    shared |= {name: {"enum": [*values, None]} for name, values in NEUTRAL.items() if name != "top_logprobs"}
    chat = shared | {
        "messages": {"type": "array", "minItems": 1, "items": _ref("Message"),
                     "description": "system, then user and assistant by turns; the last one is the user's"},
        "max_completion_tokens": _or_null(_whole(1, most)),
        "logprobs": {"type": ["boolean", "null"]},
        "top_logprobs": _or_null(_whole(0, LIKELY)),
    }  # fmt: skip
    text = {"type": "string", "minLength": 1}
    texts = shared | {
        "prompt": {"anyOf": [text, {"type": "array", "minItems": 1, "items": text}]},
        "logprobs": {"anyOf": [_or_null(_whole(0, LIKELY_OF_TEXT)), {"const": False}]},
        "top_logprobs": {"enum": [0, None]},
    }
    return {
        "chatRequest": _object(chat, ["model", "messages"]),
        "completionRequest": _object(texts, ["model", "prompt"]),
        "Message": _message(),
    }


def _message() -> Schema:
    part = {"type": "object", "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
            "required": ["type", "text"]}  # fmt: skip
    content = {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": part}]}
    role = {"enum": ["system", "developer", "user", "assistant"]}
    return {"type": "object", "properties": {"role": role, "content": content}, "required": ["role", "content"],
            "additionalProperties": {"type": "null"}}  # fmt: skip


def _replies(names: list[str]) -> Schema:
    share, count, text = {"type": "number", "minimum": 0, "maximum": 1}, _whole(0), {"type": "string"}
    experts = _object({"weights": {"type": "object", "additionalProperties": share}, "left_to_base": share})
    ended = {"enum": ["stop", "length"]}
    logprobs = {"anyOf": [_ref("ChatLogprobs"), _ref("CompletionLogprobs"), {"type": "null"}]}
    head = {"id": text, "created": count, "model": {"enum": names}}
    usage = _object({name: count for name in ("prompt_tokens", "completion_tokens", "total_tokens")})

    def reply(kind: str, said: Schema) -> Schema:
        whole = _object(said | {"index": count, "logprobs": logprobs, "finish_reason": ended, "experts": experts})
        return _object(head | {"object": {"const": kind}, "choices": {"type": "array", "items": whole}, "usage": usage})

    def chunk(kind: str, said: Schema) -> Schema:
        some = said | {"index": count, "logprobs": logprobs, "finish_reason": _or_null(ended)}
        choice = _object(some | {"experts": experts}, list(some))
        found = head | {"object": {"const": kind}, "choices": {"type": "array", "items": choice}}
        return _object(found | {"usage": usage}, list(found))

    delta = _object({"role": {"const": "assistant"}, "content": text}, [])
    said = _object({"role": {"const": "assistant"}, "content": text})
    model = {"id": {"enum": names}, "object": {"const": "model"}, "created": count, "owned_by": text}
    tasks = {"type": "object", "additionalProperties": share, "description": "of each task's gate, the expert's share"}
    error = {"message": text, "type": text, "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]}}
    return _likelihoods() | {
        "ChatReply": reply("chat.completion", {"message": said}),
        "ChatChunk": chunk("chat.completion.chunk", {"delta": delta}),
        "CompletionReply": reply("text_completion", {"text": text}),
        "CompletionChunk": chunk("text_completion", {"text": text}),
        "Models": _object({"object": {"const": "list"}, "data": {
            "type": "array", "items": _object(model | {"tasks": tasks}, list(model))}}),
        "Health": _object({"status": {"enum": ["ok", "shutting down"]}}),
        "Error": _object({"error": _object(error)}),
    }  # fmt: skip


def _likelihoods() -> Schema:
    text, natural = {"type": "string"}, {"type": "number", "maximum": 0}
    token = {"token": text, "logprob": natural, "bytes": _or_null({"type": "array", "items": _whole(0, 255)})}
    top = {"type": "array", "items": _object(token)}
    content = {"type": "array", "items": _object(token | {"top_logprobs": top})}
    texts = {"tokens": {"type": "array", "items": text}, "token_logprobs": {"type": "array", "items": natural},
             "top_logprobs": {"type": "array", "items": {"type": "object", "additionalProperties": natural}},
             "text_offset": {"type": "array", "items": _whole(0)}}  # fmt: skip
    return {
        "ChatLogprobs": _object({"content": content, "refusal": {"type": "null"}}),
        "CompletionLogprobs": _object(texts),
    }


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(properties: Schema, required: list[str] | None = None) -> Schema:
    """An object with these fields and no others; all of them are required unless some are named."""
    return {"type": "object", "properties": properties, "additionalProperties": False,
            "required": list(properties) if required is None else required}  # fmt: skip


def _whole(low: int, high: int | None = None) -> Schema:
    return {"type": "integer", "minimum": low} | ({} if high is None else {"maximum": high})


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}
