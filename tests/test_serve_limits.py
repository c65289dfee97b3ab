"""Clients that stop half-way, send too much or do not read: none holds the server, and none holds its end.

uvicorn 0.54.0 waits for every one of these for ever; with httptools 0.9.0 it reads heads of any length, and takes the
last of two Host headers. h11 0.16.0 refuses both by itself; the guard does so whatever stands before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from bozzetto.serve import guard
from bozzetto.serve.guard import guarding
from bozzetto.serve.metrics import Metrics
from bozzetto.serve.server import Connection, Server
from serving import listening_at, until

POST = b"POST /v1/x HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


class Hurried(Connection):
    """Deadlines that tests can wait for."""

    asking, unread, leaving, look = 0.4, 0.4, 0.4, 0.02


class App:
    """Answers with the size of a body; /slow when told to, /endless with bytes until nobody reads them."""

    def __init__(self) -> None:
        self.told, self.began, self.gone, self.sent = threading.Event(), threading.Event(), threading.Event(), 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for kind in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{kind}.complete"})
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.began.set()
        while scope["path"] == "/slow" and not self.told.is_set():
            await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/endless":
            watch = asyncio.ensure_future(receive())
            while not watch.done():
                await send({"type": "http.response.body", "body": b"x" * 8192, "more_body": True})
                self.sent += 8192
                await asyncio.sleep(0.001)
            self.gone.set()
        end = b"x" * 600_000 if scope["path"] == "/large" else str(len(body)).encode()
        await send({"type": "http.response.body", "body": end})


@contextlib.contextmanager
def serving(app: Any, limit: float = 10, connection: type[Connection] = Hurried) -> Iterator[int]:
    guarded = guarding(app, (), ("localhost",), Metrics())
    with listening_at(Server(guarded, limit, connection), unsent=4096) as port:
        yield port


def connected(port: int, sent: bytes) -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.settimeout(10)
    made.connect(("127.0.0.1", port))
    made.sendall(sent)
    return made


def rest(of: socket.socket) -> bytes:
    """Everything up to the end of the connection, which has to come."""
    with of:
        try:
            return b"".join(iter(lambda: of.recv(65536), b""))
        except ConnectionResetError:
            return b""


HALVES = {
    "nothing": b"",
    "half a line": b"GET / HT",
    "half a head": b"GET / HTTP/1.1\r\nhost: local",
    "half a body": POST + b"content-length: 9\r\n\r\n1234",
    "half a chunk": POST + b"transfer-encoding: chunked\r\n\r\n9\r\n1234",
}


@pytest.mark.parametrize("half", HALVES)
def test_a_connection_that_stops_half_way_is_closed(half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.4)
    with serving(App()) as port:
        answer = rest(connected(port, HALVES[half]))
    assert answer.startswith(b"HTTP/1.1 408") == ("b" in half.split()[-1][:1] or "chunk" in half), answer


def test_a_head_that_comes_byte_by_byte_has_the_same_deadline() -> None:
    with serving(App()) as port:
        slow = connected(port, b"GET / HTTP/1.1\r\n")
        with pytest.raises(OSError):
            for _ in range(200):
                slow.sendall(b"x")
                time.sleep(0.02)
        slow.close()


def test_a_connection_is_kept_for_the_next_request_and_then_closed() -> None:
    with serving(App()) as port:
        kept = connected(port, b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
        time.sleep(0.2)
        kept.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert rest(kept).count(b"200 OK") == 2


def test_an_answer_that_nobody_reads_is_given_up_and_one_that_is_read_slowly_is_not() -> None:
    app = App()
    with serving(app) as port, connected(port, b"GET /endless HTTP/1.1\r\nhost: localhost\r\n\r\n") as reader:
        read, end = 0, time.monotonic() + 1.5
        while time.monotonic() < end:
            read += len(reader.recv(16384))
            time.sleep(0.02)
        assert read > 100_000 and not app.gone.is_set()
        assert app.gone.wait(5)  # reads no more
        assert app.sent < 50_000_000


def test_an_answer_that_is_long_on_its_way_arrives_whole() -> None:
    with serving(App()) as port, connected(port, b"GET /large HTTP/1.0\r\nhost: localhost\r\n\r\n") as reader:
        read, end = 0, time.monotonic() + 1.2  # three times every deadline
        while got := len(reader.recv(16384)):
            read += got
            time.sleep(0.02 if time.monotonic() < end else 0)
    assert read > 600_000


def test_idle_connections_make_room_and_busy_ones_do_not() -> None:
    class Few(Hurried):
        most, asking = 3, 30.0

    app = App()
    with serving(app, connection=Few) as port:
        busy = connected(port, b"GET /slow HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert app.began.wait(5)
        idle = []
        for _ in range(3):
            idle.append(connected(port, b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"))
            assert b"200 OK" in idle[-1].recv(4096)
        assert rest(idle[0]) == b""
        app.told.set()
        assert b"200 OK" in busy.recv(4096)
        for one in (busy, *idle):
            one.close()


@pytest.mark.parametrize("line", [b"x-long: ", b"GET /?"], ids=["a header", "an address"])
def test_heads_are_bounded(line: bytes) -> None:
    begin = line if line.startswith(b"GET") else b"GET / HTTP/1.1\r\nhost: localhost\r\n" + line
    with serving(App()) as port:
        sender, sent = connected(port, begin), 0
        with contextlib.suppress(OSError):
            while sent < 40_000_000:
                sent += sender.send(b"x" * 65536)
        sender.close()
    assert sent < 10_000_000


def guarded(headers: list[tuple[bytes, bytes]], query: bytes = b"") -> bytes:
    """What the guard answers, whatever server stands before it (under Ray it is not ours)."""
    scope = {"type": "http", "method": "GET", "path": "/", "headers": headers, "query_string": query}
    told: list[Any] = []

    async def send(message: Any) -> None:
        told.append(message)

    async def app(*_: Any) -> None:
        await send({"status": 200, "body": b""})

    asyncio.run(guarding(app, (), ("localhost",), Metrics())(scope, lambda: asyncio.sleep(0), send))  # type: ignore[arg-type]
    return f"{told[0]['status']} ".encode() + told[-1]["body"]


HOST = (b"host", b"localhost")


@pytest.mark.parametrize(
    ("headers", "query", "named"),
    [
        ([HOST], b"", b"200"),
        ([HOST, HOST], b"", b"400 .host."),
        ([(b"Host", b"evil.example"), HOST], b"", b"400 .host."),
        ([HOST, (b"authorization", b"Bearer a"), (b"Authorization", b"Bearer b")], b"", b"400 .authorization."),
        ([HOST, (b"content-type", b"a/b"), (b"content-type", b"a/b")], b"", b"400 .content-type."),
        ([HOST, (b"content-length", b"2"), (b"content-length", b"3")], b"", b"400 .content-length."),
        ([HOST, (b"content-length", b"2"), (b"transfer-encoding", b"chunked")], b"", b"400 transfer-encoding"),
        ([HOST, *[(b"x-%d" % i, b"y" * 1000) for i in range(40)]], b"", b"431 32768"),
        ([HOST], b"x" * 40_000, b"431 32768"),
    ],
)
def test_the_guard_bounds_heads_and_takes_one_of_each(headers: Any, query: bytes, named: bytes) -> None:
    answer = guarded(headers, query)
    status, _, text = named.partition(b" ")
    assert answer.startswith(status) and text.replace(b".", b"'") in answer


def test_the_server_ends_whatever_its_clients_do_and_answers_what_it_accepted() -> None:
    """In every state of a connection at once."""

    class Patient(Hurried):
        asking = unread = 60.0

    app, unread = App(), App()

    async def both(scope: Any, receive: Any, send: Any) -> None:
        await (unread if scope.get("path") == "/endless" else app)(scope, receive, send)

    with serving(both, limit=60, connection=Patient) as port:
        halves = [connected(port, sent) for sent in HALVES.values()]
        kept = connected(port, b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert b"200 OK" in kept.recv(4096)
        deaf = connected(port, b"GET /endless HTTP/1.1\r\nhost: localhost\r\n\r\n")
        app.began.clear()
        waiting = connected(port, b"GET /slow HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert app.began.wait(5) and unread.began.wait(5)
        answered: list[bytes] = []
        reader = threading.Thread(target=lambda: answered.append(rest(waiting)))
        reader.start()
        threading.Timer(1.0, app.told.set).start()
        began = time.monotonic()
    assert 0.9 < time.monotonic() - began < 5
    reader.join(5)
    assert b"200 OK" in answered[0]
    until(unread.gone.is_set)
    for one in (*halves, kept, deaf):
        one.close()
