"""Events of a job as answers: one JSON object, or server-sent events."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from PIL import Image

from bozzetto.errors import UsageError
from bozzetto.serve.orders import Busy, Event, Failed, Finished, Order, Partial, TooLong
from bozzetto.serve.problems import ApiError, error_body
from bozzetto.serve.schema import ImageGeneration
from bozzetto.serve.worker import Job, Worker

_QUALITY = {"jpeg": {"quality": 90}, "webp": {"lossless": True}, "png": {}}
_GONE = 499  # nobody reads this answer


def encoded(picture: Image.Image, kind: str) -> bytes:
    """A picture as png (lossless), webp (lossless) or jpeg."""
    out = io.BytesIO()
    picture.save(out, kind, **_QUALITY[kind])  # type: ignore[arg-type]
    return out.getvalue()


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an order that came to nothing."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        return ApiError(429, str(error), code="queue_full", headers={"retry-after": str(error.seconds)})
    if isinstance(error, TooLong):
        return ApiError(504, str(error), code="timeout")
    if isinstance(error, UsageError):
        return ApiError(400, str(error), code="invalid_value")
    return ApiError(500, "the image could not be drawn", code="internal_error")


class Events:
    """What happens to an order, to be awaited. `next` raises the ApiError of an order that fails."""

    def __init__(self, worker: Worker, order: Order):
        self.queue: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def post(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self.queue.put_nowait, event)

        self.worker = worker
        try:
            self.job: Job = worker.submit(order, post)
        except Busy as error:
            raise as_api_error(error) from error

    async def next(self) -> Partial | Finished | Any:
        """The next event."""
        event = await self.queue.get()
        if isinstance(event, Failed):
            raise as_api_error(event.error)
        return event

    def close(self) -> None:
        """Nobody listens any more: what is not drawn will not be."""
        self.worker.cancel(self.job)


@asynccontextmanager
async def events_of(worker: Worker, order: Order) -> AsyncIterator[Events]:
    """The events of an order, which is given up when the block is left early."""
    events = Events(worker, order)
    try:
        yield events
    finally:
        events.close()


async def while_connected(work: Awaitable[Any], disconnected: Callable[[], Awaitable[Any]]) -> Any:
    """The result of `work`, given up with ApiError 499 as soon as the client has gone."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(_GONE, "the client has gone")
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()


def usage(order: Order, tokens: int) -> dict[str, Any]:
    """Tokens in the words of the API: words of the prompt in, image tokens out."""
    words = len(order.prompt.split())
    details = {"text_tokens": words, "image_tokens": 0}
    return {
        "input_tokens": words,
        "input_tokens_details": details,
        "output_tokens": tokens,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": tokens},
        "total_tokens": words + tokens,
    }


def about(event: Finished, order: Order) -> dict[str, Any]:
    """What is known of an image beyond the API."""
    return {
        "index": event.index,
        "seed": order.seed,
        "sha256": hashlib.sha256(event.picture.tobytes()).hexdigest(),
        "target_passes": event.passes,
        "tokens_per_pass": round(event.tokens / max(1, event.passes), 4),
        "accepted": event.accepted,
        "drafted": event.drafted,
        "seconds": round(event.seconds, 4),
    }


def pictured(picture: Image.Image, request: ImageGeneration) -> dict[str, str]:
    """A picture in the response format."""
    text = base64.b64encode(encoded(picture, request.output_format)).decode()
    if request.response_format == "url":
        return {"url": f"data:image/{request.output_format};base64,{text}"}
    return {"b64_json": text}


async def whole(worker: Worker, order: Order, request: ImageGeneration, size: str) -> dict[str, Any]:
    """The answer to a request that does not stream."""
    found: list[Finished] = []
    async with events_of(worker, order) as events:
        while len(found) < order.count:
            event = await events.next()
            if isinstance(event, Finished):
                found.append(event)
    found.sort(key=lambda event: event.index)
    data = [{**pictured(event.picture, request), "bozzetto": about(event, order)} for event in found]
    return {
        "created": int(time.time()),
        "background": "opaque",
        "data": data,
        "output_format": request.output_format,
        "quality": "auto",
        "size": size,
        "usage": usage(order, sum(event.tokens for event in found)),
        "seed": order.seed,
    }


async def streamed(events: Events, order: Order, request: ImageGeneration, size: str) -> AsyncIterator[bytes]:
    """Server-sent events: partial images as they come, then each image completed."""
    shared = {"background": "opaque", "output_format": request.output_format, "quality": "auto", "size": size}
    left = order.count
    try:
        while left:
            event = await events.next()
            kind, content = "partial_image", {"created_at": int(time.time()), **shared}
            if isinstance(event, Partial):
                content |= {"partial_image_index": event.number, "index": event.index}
            elif isinstance(event, Finished):
                kind, left = "completed", left - 1
                content |= {"usage": usage(order, event.tokens), "index": event.index, "bozzetto": about(event, order)}
            else:
                continue
            yield sse(f"image_generation.{kind}", content | pictured(event.picture, request))
    except ApiError as error:
        yield failed(error)
    finally:
        events.close()


def sse(name: str, content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **content})}\n\n".encode()


def failed(error: ApiError) -> bytes:
    """An error in a stream that has begun."""
    return sse("error", error_body(error.status_code, error.detail, error.param, error.code))
