"""The HTTP app: the OpenAI Images API, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from bozzetto import __version__
from bozzetto.errors import UsageError
from bozzetto.serve.answers import Events, streamed, while_connected, whole
from bozzetto.serve.guard import Guard
from bozzetto.serve.methods import lossy
from bozzetto.serve.orders import Order
from bozzetto.serve.problems import ApiError, error_body
from bozzetto.serve.schema import Drawing, ImageGeneration
from bozzetto.serve.show import shown
from bozzetto.serve.worker import Worker

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


def make_app(worker: Worker, *, keys: Sequence[str] = (), hosts: Sequence[str] = ()) -> FastAPI:
    """The app over a worker, which starts and stops with it. keys, hosts: see guard.Guard."""

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.stop()
        await asyncio.to_thread(worker.join, _END)  # it is idle, or warms up, or draws what nobody waits for any more

    app = FastAPI(title="bozzetto", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.state.worker = worker
    app.add_middleware(Guard, keys=keys, hosts=hosts, metrics=worker.metrics)
    _handle_errors(app)
    _add_api(app, worker)
    _add_page(app)
    return app


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        param, code = getattr(error, "param", None), getattr(error, "code", None)
        body = error_body(error.status_code, str(error.detail), param, code)
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return JSONResponse(error_body(500, "something went wrong: see the server's log"), 500)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body") or None
        message = first["msg"] if where is None else f"{where}: {first['msg']}"
        return JSONResponse(error_body(400, message, where, first["type"]), 400)


def _ready(worker: Worker) -> None:
    """Raises ApiError before requests are taken, and after the end."""
    if worker.failure is None and not worker.ready.is_set():
        raise ApiError(503, "not ready yet", code="starting", headers={"retry-after": "5"})
    if worker.failure is not None or not worker.is_alive():
        raise ApiError(503, worker.complaint() or "the server is stopping", code="failed")


def order_of(worker: Worker, asked: Drawing, **more: Any) -> tuple[Order, str]:
    """The order of a request, and the size of its pictures. Raises ApiError for what is not served."""
    _ready(worker)
    name = asked.model or next(iter(worker.pipes))
    if name not in worker.pipes:
        raise ApiError(
            404,
            f"model {name!r} is not served here (allowed: {', '.join(worker.pipes)})",
            param="model",
            code="model_not_found",
        )
    spoken = asked.speculation
    settings = replace(
        worker.base,
        guidance=asked.guidance_scale,
        drafter=spoken.drafter,
        rule=spoken.rule,
        window=spoken.window,
        tv_budget=spoken.tv_budget,
    )
    side = worker.pipes[name].tokenizer.config.image_size
    seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed
    return Order(name, asked.prompt, settings, seed, **more), f"{side}x{side}"


def _add_api(app: FastAPI, worker: Worker) -> None:
    @app.post("/v1/images/generations", responses=_ERRORS)
    async def generate(body: ImageGeneration, request: Request) -> Response:
        """Draw images. With `stream`, server-sent events."""
        partials = body.partial_images if body.stream else 0
        order, size = _checked(worker, body, partials)
        if body.stream:
            return _stream(streamed(Events(worker, order), order, body, size))
        return JSONResponse(await while_connected(whole(worker, order, body, size), _until_gone(request)))

    @app.post("/v1/draw", responses=_ERRORS)
    async def draw(body: Drawing) -> Response:
        """Draw one image and tell what every pass does, as server-sent events (what the page shows)."""
        order, _ = _checked(worker, body, watched=True)
        return _stream(shown(Events(worker, order), order))

    @app.get("/v1/models", responses={503: _ERRORS[503]})
    async def models() -> dict[str, Any]:
        """What is served."""
        _ready(worker)
        return {"object": "list", "data": [_described(worker, name) for name in worker.pipes]}

    @app.get("/v1/models/{name}", responses={404: _ERRORS[404], 503: _ERRORS[503]})
    async def model(name: str) -> dict[str, Any]:
        """One model."""
        _ready(worker)
        if name not in worker.pipes:
            raise ApiError(404, f"model {name!r} is not served here", param="model", code="model_not_found")
        return _described(worker, name)

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


def _checked(worker: Worker, body: Drawing, partials: int = 0, watched: bool = False) -> tuple[Order, str]:
    """The order of a body, with what only an image generation has."""
    try:
        count = body.n if isinstance(body, ImageGeneration) else 1
        order, size = order_of(worker, body, count=count, partials=partials, watched=watched)
    except UsageError as error:
        raise ApiError(400, str(error), param="speculation", code="invalid_value") from error
    if isinstance(body, ImageGeneration) and body.size not in ("auto", size):
        raise ApiError(400, f"size {body.size!r} is not allowed: auto or {size}", param="size", code="invalid_value")
    return order, size


def _stream(events: AsyncIterator[bytes]) -> StreamingResponse:
    return StreamingResponse(events, media_type="text/event-stream", headers={"x-accel-buffering": "no"})


def _until_gone(request: Request) -> Callable[[], Awaitable[None]]:
    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return gone


def _described(worker: Worker, name: str) -> dict[str, Any]:
    pipe = worker.pipes[name]
    rules = worker.rules[name]
    return {
        "id": name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "bozzetto",
        "size": f"{pipe.tokenizer.config.image_size}x{pipe.tokenizer.config.image_size}",
        "grid": pipe.tokenizer.config.grid,
        "takes_prompts": pipe.takes_prompts,
        "prompts": list(pipe.classes[:200]),
        "rules": rules,
        "lossy": lossy(rules),
    }


def _add_page(app: FastAPI) -> None:
    for path, file in (("/", "index.html"), ("/page.js", "page.js"), ("/page.css", "page.css")):
        app.add_api_route(path, _file(PAGE / file), include_in_schema=False)


def _file(path: Path) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return FileResponse(path)

    return send
