"""What the page watches: an image as it is drawn, pass by pass."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator

from bozzetto.serve.answers import STILL_HERE, Events, about, encoded, failed, sse
from bozzetto.serve.orders import Finished, Order, Progress
from bozzetto.serve.problems import ApiError


async def shown(events: Events, order: Order) -> AsyncIterator[bytes]:
    """Server-sent events: `progress` now and then, `done` with what every pass committed."""
    try:
        while True:
            event = await events.next_or_silence()
            if isinstance(event, Progress):
                picture = None if event.picture is None else base64.b64encode(encoded(event.picture, "jpeg")).decode()
                told = {"seconds": round(event.seconds, 4), "tokens": event.done, "passes": event.passes}
                yield sse("progress", {**told, "jpeg": picture})
            elif isinstance(event, Finished):
                picture = base64.b64encode(encoded(event.picture, "png")).decode()
                final = {**about(event, order), "tokens": event.image.count, "committed": event.image.trace.committed}
                yield sse("done", {**final, "png": picture})
                return
            else:
                yield STILL_HERE
    except ApiError as error:
        yield failed(error)
