"""The OpenAPI document is true: whatever a client makes of it, it is answered as the document says, and never with 5xx."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from patient import Patient  # noqa: E402
from served import APPLE, Served, get, post, serving  # noqa: E402
from smartmops.serving.answering import Answerer  # noqa: E402
from smartmops.web.bodies import Limits  # noqa: E402
from smartmops.web.openapi import document  # noqa: E402

# Of what follows the schemas, why it may be refused all the same.
UNSAID = ("sum to", "gate_weights go with model", "both given", "without logprobs", "of the model's 256 positions",
          "turn has come", "stands first or nowhere", "none of a user", "the last message is the assistant's")  # fmt: skip


@pytest.fixture(scope="module")
def real(answerer: Answerer) -> Iterator[Served]:
    with serving(answerer, most=3) as found:
        yield found


def test_each_route_is_described_and_nothing_else(real: Served) -> None:
    told = get(f"{real.url}/openapi.json").json()
    routes = {(route.path, method.lower()) for route in real.app.routes for method in route.methods - {"HEAD"}}
    assert routes == {(path, method) for path, methods in told["paths"].items() for method in methods}
    assert told == document(real.answerer, 3, Limits(), False)


def test_it_is_for_those_with_a_key(patient: Patient) -> None:
    with serving(patient, keys=("one",)) as served:
        assert get(f"{served.url}/openapi.json").status_code == 401
        told = get(f"{served.url}/openapi.json", headers={"Authorization": "Bearer one"}).json()
    guarded = {path for path, methods in told["paths"].items() for each in methods.values() if each.get("security")}
    assert guarded == {"/v1/chat/completions", "/v1/completions", "/v1/models", "/openapi.json"}
    assert all("401" in each["responses"] for path in guarded for each in told["paths"][path].values())


def test_events_of_a_stream_are_the_chunks_it_describes(real: Served) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    told = document(real.answerer, 3, Limits(), False)
    for path, name, body in (("chat/completions", "ChatChunk", {"messages": APPLE, "logprobs": True, "top_logprobs": 2}),
                             ("completions", "CompletionChunk", {"prompt": "apple is", "logprobs": 2})):  # fmt: skip
        asked = body | {"model": "auto", "stream": True, "stream_options": {"include_usage": True}}
        lines = post(f"{real.url}/v1/{path}", json=asked).text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""] and len(lines) > 3
        schema = {"$ref": f"#/components/schemas/{name}", "components": told["components"]}
        for line in lines[:-2]:
            jsonschema.validate(httpx.Response(200, text=line.removeprefix("data: ")).json(), schema)


@pytest.mark.slow
def test_whatever_a_client_makes_of_it_is_answered_as_it_says(real: Served) -> None:
    """Requests that follow the schemas and ones that break them. What schemas cannot say is answered with 400."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis asks the server")
    from schemathesis.generation import GenerationMode

    accepted = {"positive_data_acceptance": {"expected-statuses": ["200", "400"]}}
    config = schemathesis.Config.from_dict({"checks": accepted})
    schema = schemathesis.openapi.from_url(f"{real.url}/openapi.json", config=config)
    tried: dict[str, set[int]] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        told = asked(operation, GenerationMode.POSITIVE)
        surprising = [words for status, words in told if status == 400 and not any(each in words for each in UNSAID)]
        assert not surprising, "\n".join(surprising)
        if operation.method == "post":  # what takes nothing cannot be asked for wrongly
            told |= asked(operation, GenerationMode.NEGATIVE)
        tried[operation.path] = {status for status, _ in told}
    paths = set(document(real.answerer, 3, Limits(), False)["paths"])
    assert set(tried) == paths - {"/openapi.json"}  # schemathesis leaves out what it reads
    assert {200, 400} <= tried["/v1/chat/completions"] and {200, 400} <= tried["/v1/completions"]
    assert max(status for statuses in tried.values() for status in statuses) < 500
    assert (real.batcher.waiting, real.batcher.counts.failed) == (0, 0)


def asked(operation: Any, mode: Any) -> set[tuple[int, str]]:
    """Statuses, and what errors say, of requests of one kind; all are checked against the document."""
    from hypothesis import HealthCheck, Phase, given, settings

    found: set[tuple[int, str]] = set()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=60, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    def ask(case: Any) -> None:
        response = case.call_and_validate()
        failed = response.status_code >= 400
        found.add((response.status_code, response.json()["error"]["message"] if failed else ""))

    ask()
    return found
