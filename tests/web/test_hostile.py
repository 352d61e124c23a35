"""Clients that stall, trickle, hang up or do not read: each loses its place, and the server answers the others.

No test waits for a time to pass: a client that stalls does so for good, so a limit of a few hundredths of a second is one
that it breaks however slow the machine is.
"""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import suppress
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from patient import Patient  # noqa: E402
from served import APPLE, Served, post, serving, wait_for  # noqa: E402
from smartmops.serving.answering import Question  # noqa: E402
from smartmops.serving.forms import Wanted  # noqa: E402
from smartmops.tokens.parts import Prompt  # noqa: E402
from smartmops.web.bodies import Limits  # noqa: E402
from smartmops.web.server import Stream  # noqa: E402

SOON = 0.05  # seconds
CHAT = {"model": "auto", "messages": APPLE}


def head(length: int, path: str = "/v1/chat/completions") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()


def connected(served: Served) -> socket.socket:
    found = socket.create_connection(served.socket.getsockname())
    found.settimeout(60)
    return found


def heard(raw: socket.socket) -> bytes:
    """All that comes until the server closes, however it does that."""
    found = b""
    try:
        while piece := raw.recv(2**16):
            found += piece
    except ConnectionResetError:
        pass
    return found


def open_now(served: Served) -> int:
    return len(served.server.server_state.connections)


def idle(served: Served) -> bool:
    """Nothing waits, nothing runs, nobody is connected."""
    return not (
        served.batcher.waiting or served.batcher.running or open_now(served) or served.server.server_state.tasks
    )


def answers(served: Served, patient: Patient) -> None:
    """An honest client is answered as ever."""
    patient.let_go = True
    assert post(f"{served.url}/v1/chat/completions", json=CHAT).status_code == 200
    wait_for(lambda: idle(served))


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat/comp", b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: "])
def test_half_a_head_is_not_waited_for(patient: Patient, sent: bytes) -> None:
    with serving(patient, limits=Limits(head=SOON)) as served:
        with connected(served) as raw:
            raw.sendall(sent)
            assert heard(raw) == b""
        wait_for(lambda: idle(served))
    with serving(patient) as served:
        answers(served, patient)


def test_half_a_second_head_on_one_connection_is_not_waited_for(patient: Patient) -> None:
    with serving(patient, limits=Limits(head=SOON)) as served, connected(served) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert raw.recv(2**16).startswith(b"HTTP/1.1 200")
        raw.sendall(b"GET /hea")
        heard(raw)
        wait_for(lambda: idle(served))


def test_half_a_body_is_answered_with_408_and_the_connection_closed(patient: Patient) -> None:
    with serving(patient, limits=Limits(reading=SOON)) as served:
        with connected(served) as raw:
            raw.sendall(head(100) + b'{"model":')
            told = heard(raw)
        first, _, body = told.partition(b"\r\n\r\n")
        assert first.startswith(b"HTTP/1.1 408") and b"connection: close" in first.lower()
        error = json.loads(body)["error"]
        assert error["code"] == "request_timeout" and "after 0.05 s the body has not come" in error["message"]
        assert served.site.served["/v1/chat/completions", 408] == 1 and patient.batches == []
    with serving(patient) as served:
        answers(served, patient)


def test_who_hangs_up_within_a_body_is_counted_and_forgotten(
    patient: Patient, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(patient) as served:
        with connected(served) as raw:
            raw.sendall(head(100) + b'{"model":')
            wait_for(lambda: served.server.server_state.tasks)
        wait_for(lambda: served.site.served["/v1/chat/completions", 499] == 1)
        answers(served, patient)
    assert "Traceback" not in caplog.text and len(patient.batches) == 1


@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_that_is_too_large_is_not_read_to_its_end(patient: Patient, chunked: bool) -> None:
    with serving(patient, limits=Limits(body=1000, head=SOON)) as served, connected(served) as raw:
        how = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 1000000000"
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n" % how)
        raw.sendall(b"800\r\n" + b" " * 2048 + b"\r\n")
        told = raw.recv(2**16)
        assert told.startswith(b"HTTP/1.1 413")
        raw.sendall(b" ")  # the rest comes for ever; it is not listened to for long
        heard(raw)
        wait_for(lambda: idle(served))


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_takes_too_long_is_given_up(patient: Patient, stream: bool) -> None:
    with serving(patient, limits=Limits(answer=SOON)) as served:
        found = post(f"{served.url}/v1/chat/completions", json=CHAT | {"stream": stream})
        if stream:
            assert found.status_code == 200 and "[DONE]" not in found.text
            error = json.loads(found.text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]
        else:
            assert found.status_code == 504 and "retry-after" in found.headers
            error = found.json()["error"]
        assert error["code"] == "timeout" and "after 0.05 s the answer has not ended" in error["message"]
        wait_for(lambda: served.batcher.counts.cancelled == 1 and not served.batcher.running)


class Talker(Patient):
    """Says more than a connection holds, and then no more."""

    def join(self, questions: Any) -> Any:
        new = super().join(questions)
        for question in questions:
            for _ in range(64):
                question.on_text("x" * 2**20)
        return new


def test_who_does_not_read_its_answer_loses_its_place() -> None:
    talker = Talker()
    with serving(talker, limits=Limits(writing=SOON)) as served:
        with connected(served) as raw:
            body = json.dumps(CHAT | {"stream": True}).encode()
            raw.sendall(head(len(body)) + body)
            wait_for(lambda: served.batcher.counts.cancelled == 1)
            wait_for(lambda: idle(served))
            assert served.batcher.counts.cancelled == 1 and idle(served)
        talker.let_go = True


def test_a_stream_whose_client_is_gone_before_its_first_event_ends_its_answer() -> None:
    question = Question(Prompt([1], None, 0), "")
    wanted = Wanted("auto", True, [question], 1, True, False)

    async def gone() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(_: object) -> None:
        await asyncio.Event().wait()  # never written

    async def run() -> None:
        await Stream(wanted, asyncio.Queue(), 600.0)({"type": "http", "asgi": {"spec_version": "2.3"}}, gone, send)  # type: ignore[arg-type]

    asyncio.run(run())
    assert question.cancelled


def test_one_connection_too_many_is_sent_away(patient: Patient) -> None:
    with serving(patient, limits=Limits(connections=2)) as served:
        held = [connected(served) for _ in range(2)]
        wait_for(lambda: open_now(served) == 2)
        with connected(served) as raw:
            first, _, body = heard(raw).partition(b"\r\n\r\n")
        assert first.startswith(b"HTTP/1.1 503 Service Unavailable") and b"retry-after" in first
        assert json.loads(body)["error"]["code"] == "too_many_connections"
        for each in held:
            each.close()
        wait_for(lambda: open_now(served) == 0)
        answers(served, patient)


@pytest.mark.parametrize("sent", [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"hello\r\n\r\n",
    head(-1), head(5) + b"{}{}{" + b"garbage\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnothing\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 2**17,
])  # fmt: skip
def test_what_is_no_http_is_refused_in_one_line_of_json(patient: Patient, sent: bytes) -> None:
    with serving(patient) as served:
        with connected(served) as raw:
            with suppress(BrokenPipeError, ConnectionResetError):  # refused before its end
                raw.sendall(sent)
            told = heard(raw)
        assert b"HTTP/1.1 400" in told or told == b""  # a connection that is reset takes the words with it
        if b"no_http" in told:
            assert json.loads(told.rpartition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
        answers(served, patient)


def test_half_a_character_in_the_name_of_a_field_is_told(patient: Patient) -> None:
    with serving(patient) as served:
        for body in (
            r'{"\ud800": 1}',
            r'{"model": "\ud800", "messages": []}',
            r'{"model": "auto", "stop": {"\udc00": 1}}',
        ):
            found = post(f"{served.url}/v1/chat/completions", content=body)
            assert found.status_code in (400, 404) and found.json()["error"]["message"]
