"""Events of a job as answers: one JSON object, or server-sent events."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from typing import Any

from PIL import Image

from bozzetto.checkpoints.load_settings import written
from bozzetto.errors import UsageError
from bozzetto.serve.orders import Event, Finished, Job, Order, Partial
from bozzetto.serve.problems import ApiError, without_places
from bozzetto.serve.worker import Worker

KEEP_ALIVE = 5.0  # seconds without an event after which a stream says that it is there: proxies cut silent ones
STILL_HERE = b": keep-alive\n\n"  # a comment, which readers of events pass over
_GONE = 499  # nobody reads this answer
_JPEG = 90  # quality, where none is asked for


def pictured(order: Order, picture: Image.Image) -> dict[str, str]:
    """A picture in the response format."""
    if order.scaled and order.pixels:
        picture = picture.resize(order.pixels, Image.Resampling.LANCZOS)
    text = in_text(picture, order.kind, order.strength)
    return {"url": f"data:image/{order.kind};base64,{text}"} if order.link else {"b64_json": text}


def in_text(picture: Image.Image, kind: str, strength: int | None = None) -> str:
    """A picture as base64."""
    return base64.b64encode(encoded(picture, kind, strength)).decode()


def encoded(picture: Image.Image, kind: str, strength: int | None = None) -> bytes:
    """A picture as png (lossless), webp (lossless, unless a strength below 100 is asked for) or jpeg."""
    options: dict[str, Any] = {}
    if kind == "jpeg":
        options = {"quality": _JPEG if strength is None else strength}
    elif kind == "webp":
        options = {"lossless": True} if strength in (None, 100) else {"quality": strength}
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def as_api_error(error: Exception, worker: Worker) -> ApiError:
    """What a client is told of an order that came to nothing: nothing of where files lie here."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UsageError):
        folders = [(str(pipe.folder), name) for name, pipe in worker.pipes.items() if pipe.folder is not None]
        return ApiError(400, without_places(str(error), folders), code="invalid_value")
    return ApiError(500, "the image could not be drawn", code="internal_error")


class Events:
    """What happens to an order, to be awaited: None as soon as it is known that it can be drawn, then its events.
    `next` raises the ApiError of an order that fails."""

    def __init__(self, worker: Worker, order: Order):
        self.queue: asyncio.Queue[Event | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def post(event: Event | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self.queue.put_nowait, event)

        self.worker = worker
        self.job: Job = worker.submit(order, post, lambda: post(None))

    async def next(self) -> Partial | Finished | None:
        """The next event."""
        event = await self.queue.get()
        if isinstance(event, Exception):
            raise as_api_error(event, self.worker)
        return event

    async def next_or_silence(self) -> Partial | Finished | None:
        """The next event; None after KEEP_ALIVE seconds without one."""
        try:
            return await asyncio.wait_for(self.next(), KEEP_ALIVE)
        except asyncio.TimeoutError:
            return None

    def close(self) -> None:
        """Nobody listens any more: what is not drawn will not be."""
        self.worker.cancel(self.job)


async def accepted(worker: Worker, order: Order, disconnected: Callable[[], Awaitable[Any]]) -> Events:
    """The events of an order that can be drawn, so that a stream of them may begin. Raises the ApiError of one that
    cannot, and 499 as soon as the client has gone."""
    events = Events(worker, order)
    try:
        await while_connected(events.next(), disconnected)
    except BaseException:
        events.close()
        raise
    return events


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
        "model": order.model,
        "index": event.index,
        "seed": order.seed,
        "size": written(event.picture.size),
        "sha256": hashlib.sha256(event.picture.tobytes()).hexdigest(),
        "target_passes": event.image.passes,
        "tokens_per_pass": round(event.image.count / max(1, event.image.passes), 4),
        "accepted": event.image.accepted,
        "drafted": event.image.drafted,
        "seconds": round(event.seconds, 4),
        "near_tie": event.near_tie,
        "sampling": said(order),
    }


def said(order: Order) -> dict[str, Any]:
    """How an order is sampled, in the words of requests: what it asks for, or the model's own."""
    law = order.settings
    words = {"negative_prompt": law.negative_prompt, "quality_words": law.quality_words}
    numbers = {
        "guidance_scale": law.guidance,
        **{name: getattr(law, name) for name in ("temperature", "top_k", "top_p")},
    }
    return {**numbers, **{name: value for name, value in words.items() if value}}


async def whole(worker: Worker, order: Order) -> dict[str, Any]:
    """The answer to a request that does not stream."""
    found: list[Finished] = []
    with closing(Events(worker, order)) as events:
        while len(found) < order.count:
            event = await events.next()
            if isinstance(event, Finished):
                found.append(event)
    found.sort(key=lambda event: event.index)
    pictures = [await asyncio.to_thread(pictured, order, event.picture) for event in found]
    return {
        "created": int(time.time()),
        "data": [{**made, "bozzetto": about(event, order)} for made, event in zip(pictures, found, strict=True)],
        **_shared(order, found[0].picture),
        "usage": usage(order, sum(event.image.count for event in found)),
        "seed": order.seed,
    }


def _shared(order: Order, picture: Image.Image) -> dict[str, str]:
    size = written(order.pixels or picture.size)
    return {"background": "opaque", "output_format": order.kind, "quality": "auto", "size": size}


async def streamed(events: Events, order: Order) -> AsyncIterator[bytes]:
    """Server-sent events: partial images as they come, then each image completed."""
    left = order.count
    try:
        while left:
            event = await events.next_or_silence()
            if event is None:
                yield STILL_HERE
                continue
            content = {"created_at": int(time.time()), **_shared(order, event.picture)}
            if isinstance(event, Partial):
                kind, content = "partial_image", {**content, "partial_image_index": event.number, "index": event.index}
            else:
                kind, left = "completed", left - 1
                used = {"usage": usage(order, event.image.count), "index": event.index}
                content |= {**used, "bozzetto": about(event, order)}
            yield sse(f"image_generation.{kind}", content | await asyncio.to_thread(pictured, order, event.picture))
    except ApiError as error:
        yield failed(error)


async def shown(events: Events, order: Order) -> AsyncIterator[bytes]:
    """An image as it is drawn, for the page: `progress` now and then, `done` with what every pass committed."""
    try:
        while True:
            event = await events.next_or_silence()
            if isinstance(event, Partial):
                told = {"seconds": round(event.seconds, 4), "tokens": event.done, "passes": event.passes}
                yield sse("progress", {**told, "jpeg": in_text(event.picture, "jpeg")})
            elif isinstance(event, Finished):
                final = {**about(event, order), "tokens": event.image.count, "committed": event.image.trace.committed}
                yield sse("done", {**final, "png": in_text(event.picture, "png")})
                return
            else:
                yield STILL_HERE
    except ApiError as error:
        yield failed(error)


def sse(name: str, content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **content})}\n\n".encode()


def failed(error: ApiError) -> bytes:
    """An error in a stream that has begun."""
    return sse("error", error.body())
