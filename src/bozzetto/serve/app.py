"""The HTTP app: the OpenAI Images API, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from bozzetto import __version__
from bozzetto.serve.answers import Events, accepted, shown, streamed, while_connected, whole
from bozzetto.serve.guard import guarding
from bozzetto.serve.problems import ApiError, error_body, misread
from bozzetto.serve.schema import ImageGeneration, Watched
from bozzetto.serve.terms import Terms
from bozzetto.serve.worker import Worker

_UNSAID = ("Not Found", "Method Not Allowed")  # of which the framework says no more
PAGE = Path(__file__).parent / "page"
_END = 4.0  # seconds that the thread has for its end
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": about}
    for status, about in {
        400: "what is asked for is not allowed",
        401: "an API key is needed",
        404: "no such model",
        413: "the body is too large",
        415: "the body is no JSON",
        429: "the queue is full: see Retry-After",
        503: "not ready yet, or out of order",
    }.items()
}


def make_app(
    worker: Worker,
    *,
    keys: Sequence[str] = (),
    hosts: Sequence[str] = (),
    terms: Terms | None = None,
    wait: bool = False,
) -> FastAPI:
    """The app over a worker, which starts and stops with it. keys, hosts: see `guarding`; terms: what is agreed to
    (None: models by their own names, pictures as they are drawn); wait: it begins when the worker is warm, or raises
    RuntimeError, instead of answering 503 until then."""

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        if wait:
            await asyncio.to_thread(worker.settled.wait)
            if worker.failure is not None:
                raise RuntimeError(worker.complaint())
        yield
        worker.stop()
        await asyncio.to_thread(worker.join, _END)  # it is idle, or warms up, or draws what nobody waits for any more

    app = FastAPI(title="bozzetto", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.state.worker = worker
    app.add_middleware(guarding, keys=keys, hosts=hosts, metrics=worker.metrics)
    _handle_errors(app)
    _add_api(app, terms or Terms(worker))
    _add_page(app)
    return app


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        param, code = getattr(error, "param", None), getattr(error, "code", None)
        message = str(error.detail)
        if message in _UNSAID:
            message = f"{message}: {request.method} {request.url.path[:100]}"
        body = error_body(error.status_code, message, param, code)
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return JSONResponse(error_body(500, "something went wrong: see the server's log"), 500)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return JSONResponse(misread(error.errors()[0]), 400)


def _ready(worker: Worker) -> None:
    """Raises ApiError before requests are taken, and after the end."""
    if worker.failure is None and not worker.ready.is_set():
        raise ApiError(503, "not ready yet", code="starting", headers={"retry-after": "5"})
    if worker.failure is not None or not worker.is_alive():
        raise ApiError(503, worker.complaint() or "the server is stopping", code="failed")


def _add_api(app: FastAPI, terms: Terms) -> None:
    worker = terms.worker

    @app.post("/v1/images/generations", responses=_ERRORS)
    async def generate(body: ImageGeneration, request: Request) -> Response:
        """Draw images. With `stream`, server-sent events, which begin when it is known that there will be pictures."""
        _ready(worker)
        order = terms.order(body)
        if body.stream:
            events = await accepted(worker, order, _until_gone(request))
            return _Stream(events, streamed(events, order))
        return JSONResponse(await while_connected(whole(worker, order), _until_gone(request)))

    @app.post("/v1/draw", responses=_ERRORS)
    async def draw(body: Watched, request: Request) -> Response:
        """Draw one image and tell what every pass does, as server-sent events (what the page shows)."""
        _ready(worker)
        order = terms.order(body, watched=body.pictures)
        events = await accepted(worker, order, _until_gone(request))
        return _Stream(events, shown(events, order))

    @app.get("/v1/models", responses={503: _ERRORS[503]})
    async def models() -> dict[str, Any]:
        """What is served."""
        _ready(worker)
        return {"object": "list", "data": terms.listed()}

    @app.get("/v1/models/{name:path}", responses={404: _ERRORS[404], 503: _ERRORS[503]})
    async def model(name: str) -> dict[str, Any]:
        """One model. Its name may have a slash."""
        _ready(worker)
        return terms.described(name) if name else await models()

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses={503: _ERRORS[503]})
    async def health() -> dict[str, Any]:
        """200 as long as requests are answered, from the end of the warm-up on."""
        _ready(worker)
        if complaint := worker.complaint():
            raise ApiError(503, complaint, code="failing", headers={"retry-after": "5"})
        return {"status": "ok", "models": list(worker.pipes), "images": worker.held}

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(worker.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


class _Stream(StreamingResponse):
    """Server-sent events of an order, which is given up when this answer ends, even before it began."""

    def __init__(self, events: Events, told: AsyncIterator[bytes]):
        super().__init__(told, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.events.close()


def _until_gone(request: Request) -> Callable[[], Awaitable[None]]:
    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return gone


def _add_page(app: FastAPI) -> None:
    for path, file in (("/", "index.html"), ("/page.js", "page.js"), ("/page.css", "page.css")):
        app.add_api_route(path, _file(PAGE / file), methods=["GET", "HEAD"], include_in_schema=False)


def _file(path: Path) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return FileResponse(path)

    return send
