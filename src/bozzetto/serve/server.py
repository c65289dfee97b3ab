"""The HTTP server: uvicorn, with an end to whatever a client may leave half done, and to the process.

uvicorn (0.54.0) has a deadline for connections between two requests and for nothing else: a connection that never
asked, a head or a body that stops in the middle and an answer that nobody reads last for ever, and being told to stop
it waits for them. Where httptools is installed it takes heads of any length, so it is told to use h11.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from bozzetto.runtime.kept import leave_nothing

GRACE = 10.0  # seconds after those of a request, when the process is gone
_HEAD = 16 * 1024  # bytes of a head that is not whole yet
_SHARE = 16 * 1024  # bytes of an answer; who takes less of it in `unread` seconds does not read


class Connection(H11Protocol):
    """A connection that ends when its client does not go on. asking: seconds from its beginning, or the last answer, to
    the end of a request's head (the guard has a deadline for bodies); unread: seconds in which some of an answer has to
    be taken; leaving: both of them, and for what is left of a body, once the server stops; most: connections, beyond
    which the one that has been without a request for longest makes room."""

    asking, unread, leaving, most = 30.0, 30.0, 4.0, 500
    look = 0.5

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.since = self.moved = time.monotonic()
        self.unsent, self.told = 0, False
        super().connection_made(transport)
        if len(self.connections) > self.most:
            others = [c for c in self.connections if isinstance(c, Connection) and c.idle() and c is not self]
            still = [c for c in others if not c.transport.is_closing()]
            min(still or [self], key=lambda c: c.since).transport.abort()
        self.watch = self.loop.call_later(self.look, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self.watch.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self.since = time.monotonic()
        super().on_response_complete()

    def shutdown(self) -> None:
        self.told, self.since, self.moved = True, time.monotonic(), time.monotonic()
        super().shutdown()

    def idle(self) -> bool:
        """Whether no request is under way whose head is whole."""
        return self.cycle is None or self.cycle.response_complete

    def _look(self) -> None:
        """Give up a client that does not go on."""
        now = time.monotonic()
        self.watch = self.loop.call_later(self.look, self._look)
        unsent = self.transport.get_write_buffer_size()
        if not unsent or unsent <= self.unsent - _SHARE:
            self.unsent, self.moved = unsent, now
        self.unsent = max(unsent, self.unsent)
        if unsent and self.idle():
            self.since = now  # an answer that is long on its way: the next request is not due before its end
        asks = self.idle() or (self.told and self.cycle.more_body)
        asking, unread = (self.leaving, self.leaving) if self.told else (self.asking, self.unread)
        if (asks and now - self.since > asking) or now - self.moved > unread:
            self.transport.abort()


class Server(uvicorn.Server):
    """app: ASGI; limit: seconds that a request may take. Told to stop it takes no connection any more, and answers what
    it accepted; `limit` and GRACE seconds later, or told a second time, the process ends whatever it does. word:
    printed once it can be asked, and told to stop."""

    def __init__(self, app: Any, limit: float, connection: type[Connection] = Connection, word: str = ""):
        config = uvicorn.Config(
            app,
            http=connection,
            ws="none",  # a WebSocket would have none of the deadlines
            h11_max_incomplete_event_size=_HEAD,
            timeout_keep_alive=math.ceil(connection.asking),
            timeout_graceful_shutdown=math.ceil(limit + GRACE / 2),
            log_level="warning",
            access_log=False,
        )
        super().__init__(config)
        self.stop, self.word = stopper(limit + GRACE, threading.Event()), word

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.word:
            print(self.word, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.stop(sig, frame)
        super().handle_exit(sig, frame)


def stopper(seconds: float, told: threading.Event) -> Callable[[int, Any], None]:
    """What signals mean: the first one sets `told` and starts a clock, the second, or the end of these seconds, ends
    the process."""

    def stop(sig: int, frame: FrameType | None) -> None:
        if told.is_set():
            leave("stopped at once: what was still drawn is lost", 128 + sig)
        told.set()
        _write("stopping: what was accepted is still drawn (a second signal stops at once)")
        watch = threading.Timer(seconds, leave, (f"{seconds:g} s are over: what was still drawn is lost", 1))
        watch.daemon = True
        watch.start()

    return stop


def leave(message: str, code: int) -> None:
    """End the process now. Interpreters that shut down under a thread that computes abort."""
    if message:
        _write(message)
    leave_nothing()  # exit handlers are not run
    os._exit(code)


def _write(message: str) -> None:
    """To stderr, past buffers: a signal may come while they are written to."""
    with contextlib.suppress(OSError):  # nobody reads it
        os.write(2, f"bozzetto: {message}\n".encode())
