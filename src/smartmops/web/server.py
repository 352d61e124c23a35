"""HTTP in OpenAI's form over a run: routes, keys, metrics, and how the server ends. Knows no tokens."""

from __future__ import annotations

import asyncio
import hmac
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

from smartmops.checks.errors import MissingExtra
from smartmops.checks.resources import listening
from smartmops.options.finished.serving import ServeConfig, keys_in
from smartmops.playground import page
from smartmops.serving.answering import Answer, Answerer, Answers, Question
from smartmops.serving.batching import Batcher, Closing, Full
from smartmops.serving.forms import Refused, Reply, Wanted, models, understood

try:
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
    from starlette.exceptions import HTTPException
    from starlette.types import Receive, Scope, Send

    from .bodies import Gone, Limits, parsed, read
    from .connections import RETRY, Connection
    from .openapi import document
except ImportError as error:
    raise MissingExtra('serve needs FastAPI and uvicorn: pip install "smartmops[serve]"') from error

HEAVY = 2**16  # bytes of a request from which on it is read beside the loop, which others wait for
POLICY = "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
GONE = 499  # status of a request whose client went away: it is counted, and nobody reads it
GRACE = 30  # seconds that answers under way have once the server is told to end
LOCAL = ("127.0.0.1", "localhost", "::1")
Event = tuple[int, str | Answer]  # which answer of a request, and what is new of it


class Site:
    """What the routes share."""

    def __init__(
        self, answerer: Answers, batcher: Batcher, most: int, keys: list[str], limits: Limits | None = None
    ) -> None:
        self.answerer, self.batcher, self.most = answerer, batcher, most
        self.limits = limits or Limits()
        self.keys = [key.encode() for key in keys]
        self.served: Counter[tuple[str, int]] = Counter()

    async def answer(self, request: Request, chat: bool) -> Response:
        """The reply to a request; whatever is wrong with it, in OpenAI's form."""
        try:
            response = await self._answer(request, chat)
        except Refused as refused:
            response = said(refused)
        except Gone:
            response = Response(status_code=GONE)
        self.served[request.url.path, response.status_code] += 1
        return response

    async def _answer(self, request: Request, chat: bool) -> Response:
        self.admit(request)
        body = await read(request, self.limits)
        if len(body) > HEAVY:
            wanted = await asyncio.to_thread(self._understood, body, chat)
        else:
            wanted = self._understood(body, chat)
        events: asyncio.Queue[Event] = asyncio.Queue()
        self._submit(wanted.questions, events)
        if wanted.stream:
            return Stream(wanted, events, self.limits.answer)
        return await whole(request, wanted, events, self.limits.answer)

    def _understood(self, body: bytes, chat: bool) -> Wanted:
        return understood(parsed(body), chat, self.answerer, self.most, self.batcher.room)

    def admit(self, request: Request) -> None:
        """Let only clients with a key through, where there are keys.

        Raises:
            Refused: it is not one of them.
        """
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        own = given.strip().encode("latin-1")  # the bytes that came
        known = [hmac.compare_digest(own, key) for key in self.keys]  # all, however early one fits
        if self.keys and (scheme.lower() != "bearer" or not any(known)):
            raise Refused(
                401, "no valid key came with the request: send 'Authorization: Bearer KEY'", None, "invalid_api_key"
            )

    def told(self, request: Request, what: Callable[[], Any]) -> Response:
        """JSON for those with a key, where there are keys."""
        try:
            self.admit(request)
        except Refused as refused:
            return said(refused)
        return JSONResponse(what())

    def _submit(self, questions: list[Question], events: asyncio.Queue[Event]) -> None:
        loop = asyncio.get_running_loop()

        def tell(index: int, what: str | Answer) -> None:
            with suppress(RuntimeError):  # the loop has ended, and nobody wants to know
                loop.call_soon_threadsafe(events.put_nowait, (index, what))

        for index, question in enumerate(questions):
            question.on_text = question.on_end = partial(tell, index)
        try:
            self.batcher.submit(questions)
        except Full:
            raise Refused(429, f"{self.batcher.room} answers may wait, and there is no room for {len(questions)} more: "
                          "try again later", None, "queue_full", RETRY) from None  # fmt: skip
        except Closing:
            raise Refused(503, "the server is shutting down: try again later", None, "shutting_down", RETRY) from None

    def metrics(self) -> str:
        """All counts as Prometheus reads them."""
        counts, batcher = self.batcher.counts, self.batcher
        totals = {
            "batches": ("batches answered", counts.batches), "answers": ("answers generated", counts.questions),
            "cancelled": ("answers whose client went away", counts.cancelled),
            "failed": ("answers that failed", counts.failed),
            "prompt_tokens": ("tokens read", counts.prompt_tokens), "tokens": ("tokens generated", counts.tokens),
        }  # fmt: skip
        gauges = {"waiting": ("answers that wait", batcher.waiting), "running": ("answers under way", batcher.running)}
        lines = [
            "# HELP smartmops_requests_total requests by path and status",
            "# TYPE smartmops_requests_total counter",
        ]
        lines += [f'smartmops_requests_total{{path="{path}",status="{status}"}} {count}'
                  for (path, status), count in sorted(self.served.items())]  # fmt: skip
        for kind, ending, values in (("counter", "_total", totals), ("gauge", "", gauges)):
            for name, (words, value) in values.items():
                full = f"smartmops_{name}{ending}"
                lines += [f"# HELP {full} {words}", f"# TYPE {full} {kind}", f"{full} {value}"]
        return "\n".join(lines) + "\n"


def said(refused: Refused) -> Response:
    """A refusal as a response."""
    headers = {} if refused.retry is None else {"Retry-After": str(refused.retry)}
    if refused.status == 408:
        headers["Connection"] = "close"  # what still comes of its body would be read as a request
    text = json.dumps(refused.body)  # in ASCII: it may quote half a character
    return Response(text, refused.status, headers, media_type="application/json")


async def whole(request: Request, wanted: Wanted, events: asyncio.Queue[Event], seconds: float) -> Response:
    """All answers at once; none are needed any more once the client has gone, or after so many seconds."""
    answers = asyncio.ensure_future(collected(len(wanted.questions), events))
    gone = asyncio.ensure_future(left(request))
    try:
        await asyncio.wait({answers, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not answers.done():
            if gone.done():
                return Response(status_code=GONE)  # nobody reads it
            raise late(seconds)
        if any(answer.ended in ("failed", "cancelled") for answer in answers.result()):
            raise failed(answers.result())
        return JSONResponse(Reply(wanted).whole(answers.result()))
    finally:
        answers.cancel()
        gone.cancel()
        forget(wanted)


def late(seconds: float) -> Refused:
    """Why an answer is no longer waited for."""
    why = f"after {seconds:g} s the answer has not ended, which is the limit: ask for fewer tokens, or try again later"
    return Refused(504, why, None, "timeout", RETRY)


def failed(answers: list[Answer]) -> Refused:
    """Why there is no answer."""
    if any(answer.ended == "failed" for answer in answers):
        return Refused(500, "the model failed on this batch: the server's log says why", None, "model_failed")
    return Refused(503, "the server is shutting down: try again later", None, "shutting_down", RETRY)


async def collected(count: int, events: asyncio.Queue[Event]) -> list[Answer]:
    """All answers of a request, in order."""
    found: dict[int, Answer] = {}
    while len(found) < count:
        index, what = await events.get()
        if isinstance(what, Answer):
            found[index] = what
    return [found[index] for index in range(count)]


async def left(request: Request) -> None:
    """Wait until the client goes."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Stream(StreamingResponse):
    """Server-sent events of a request's answers as they come; a client that goes ends this, and so the answers."""

    def __init__(self, wanted: Wanted, events: asyncio.Queue[Event], seconds: float) -> None:
        super().__init__(streamed(wanted, events, seconds), media_type="text/event-stream")
        self.wanted = wanted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all; the answers end even where the client has gone before the first event."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            forget(self.wanted)


async def streamed(wanted: Wanted, events: asyncio.Queue[Event], seconds: float) -> AsyncIterator[str]:
    """Server-sent events of a request's answers as they come, for at most so many seconds."""
    reply, found = Reply(wanted), dict[int, Answer]()
    end = asyncio.get_running_loop().time() + seconds
    for index in range(len(wanted.questions)):
        if (chunk := reply.opening(index)) is not None:
            yield event(chunk)
    while len(found) < len(wanted.questions):
        try:
            async with asyncio.timeout_at(end):
                index, what = await events.get()
        except TimeoutError:
            yield event(late(seconds).body)
            return
        if isinstance(what, str):
            yield event(reply.piece(index, what))
        elif what.ended in ("failed", "cancelled"):
            yield event(failed([what]).body)
            return
        elif index not in found:
            found[index] = what
            yield event(reply.closing(index, what))
    if wanted.usage:
        yield event(reply.counted(list(found.values())))
    yield "data: [DONE]\n\n"


def event(what: Any) -> str:
    """JSON as a server-sent event."""
    return f"data: {json.dumps(what, ensure_ascii=False)}\n\n"


def forget(wanted: Wanted) -> None:
    """Nobody wants to know any more; says nothing to answers that have ended."""
    for question in wanted.questions:
        question.cancelled = True


def make_app(site: Site) -> FastAPI:
    """The routes."""
    app = FastAPI(title="smartmops", docs_url=None, redoc_url=None, openapi_url=None)
    _answering(app, site)
    _telling(app, site)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}"
        code = "method_not_allowed" if error.status_code == 405 else "not_found"
        response = said(Refused(error.status_code, f"{where}: {error.detail}", None, code))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return said(Refused(500, "the server failed on this request: its log says why", None, "server_failed"))

    return app


def _answering(app: FastAPI, site: Site) -> None:
    """What makes tokens."""

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await site.answer(request, True)

    @app.post("/v1/completions")
    async def completion(request: Request) -> Response:
        return await site.answer(request, False)


def _telling(app: FastAPI, site: Site) -> None:
    """What tells of the run and of the server."""

    @app.get("/")
    async def playground() -> Response:
        return HTMLResponse(page(site.most), headers={"Content-Security-Policy": POLICY})

    @app.get("/openapi.json")
    async def described(request: Request) -> Response:
        return site.told(request, lambda: document(site.answerer, site.most, site.limits, bool(site.keys)))

    @app.get("/v1/models")
    async def known(request: Request) -> Response:
        return site.told(request, lambda: listed(site.answerer))

    @app.get("/health")
    async def health() -> Response:
        closing = site.batcher.closing
        return JSONResponse({"status": "shutting down" if closing else "ok"}, 503 if closing else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(site.metrics())


def listed(answerer: Answers) -> dict[str, Any]:
    """What can be asked for, and how much each task gives to each expert, where the run knows that."""
    data: list[dict[str, Any]] = [
        {"id": name, "object": "model", "created": 0, "owned_by": "smartmops"} for name in models(answerer)
    ]
    for each in data:
        if each["id"] in answerer.tasks:
            each["tasks"] = answerer.tasks[each["id"]]
    return {"object": "list", "data": data}


class Server(uvicorn.Server):
    """Ends gently: told to end, it takes no more requests and answers those it has; told twice, it gives them up."""

    def __init__(self, app: FastAPI, batcher: Batcher, ready: Callable[[], Any], limits: Limits | None = None) -> None:
        protocol: Any = partial(Connection, limits=limits or Limits())
        super().__init__(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=GRACE,
                                        http=protocol, ws="none"))  # fmt: skip
        self.batcher, self.ready = batcher, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self.ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal; unlike uvicorn's own, it is not raised again at the end: to be told to end is no failure."""
        self.batcher.close()
        if self.should_exit:
            self.batcher.cancel()
            self.force_exit = True
        self.should_exit = True


def serve(config: ServeConfig, say: Callable[[str], Any] = print) -> None:
    """Answer requests until SIGTERM or Ctrl-C; then those that came are answered, and it returns.

    Raises:
        PortTaken: the address cannot be had, or the run has no experts.
    """
    with listening(config.host, config.port) as line:
        answerer = Answerer.open(config.run)
        keys = [] if config.api_key_file is None else keys_in(config.api_key_file)
        batcher = Batcher(answerer, config.batch_size, config.queue).start()
        host, port = line.getsockname()[:2]
        open_to_all = "" if keys or config.host in LOCAL else " without a key: whoever reaches this address is answered"
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        words = f"{where} serves {', '.join(models(answerer))}{open_to_all}"
        limits = Limits(answer=config.request_timeout)
        app = make_app(Site(answerer, batcher, config.max_tokens, keys, limits))
        server = Server(app, batcher, lambda: say(words), limits)
        try:
            server.run(sockets=[line])
        finally:
            batcher.close()
            batcher.cancel()
            batcher.join()
