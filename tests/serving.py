"""A live server on loopback, in this process, for tests."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import openai

from bozzetto.pipeline.pipeline import Pipeline
from bozzetto.serve.app import make_app
from bozzetto.serve.server import Server
from bozzetto.serve.terms import Terms
from bozzetto.serve.worker import Worker


@dataclass
class Live:
    """A server. url: its root; worker: what decodes."""

    url: str
    worker: Worker

    def client(self, key: str = "no key is needed") -> openai.OpenAI:
        """The official client; nothing is tried twice."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)


@contextlib.contextmanager
def live(
    pipes: dict[str, Pipeline],
    *,
    keys: tuple[str, ...] = (),
    aliases: Mapping[str, str] = MappingProxyType({}),
    resize: bool = False,
    **settings: Any,
) -> Iterator[Live]:
    """Serve models until the block ends; settings: of Worker."""
    worker = Worker(lambda: pipes, **{"slots": 4, "queue": 8, **settings})
    app = make_app(worker, keys=keys, hosts=("127.0.0.1", "localhost"), terms=Terms(worker, aliases, resize))
    with listening_at(Server(app, worker.limit)) as port:
        until(lambda: worker.ready.is_set() or worker.failure, 60)
        yield Live(f"http://127.0.0.1:{port}", worker)


@contextlib.contextmanager
def listening_at(server: Server, unsent: int = 0) -> Iterator[int]:
    """A port where the server answers until the block ends. unsent: bytes of answers that the system takes."""
    listening = socket.create_server(("127.0.0.1", 0))
    if unsent:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, unsent)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()
        assert not thread.is_alive(), "the server does not end"


def until(true: Any, seconds: float = 20) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def slowed(worker: Worker, seconds: float) -> None:
    """Make every pass take longer."""
    whole = worker._pass

    def slow(*given: Any) -> None:
        time.sleep(seconds)
        whole(*given)

    worker._pass = slow  # type: ignore[method-assign]
