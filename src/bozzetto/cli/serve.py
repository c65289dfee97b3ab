"""`bozzetto serve`: from options to a running server."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bozzetto.cli.options import Serve, idle, loading_of, settings_from
from bozzetto.common.hub import model_name
from bozzetto.common.terminal import note
from bozzetto.errors import UsageError, check_number, require
from bozzetto.pipeline.loading import load
from bozzetto.pipeline.pipeline import Pipeline
from bozzetto.serve.app import make_app
from bozzetto.serve.server import Server, leave
from bozzetto.serve.terms import Terms
from bozzetto.serve.worker import Worker
from bozzetto.settings import GenerateSettings

_DAY = 86_400
_LOCAL = ("localhost", "127.0.0.1", "[::1]")


def serve(options: Serve, keys: Sequence[str]) -> None:
    """Serve until told to stop; requests that were accepted are answered first. Raises OSError for an address that is
    taken, before anything is loaded."""
    with _listen(options.host, options.port) as listening:
        worker = make_worker(options)
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        word = f"serving {', '.join(models_of(options))} at http://{shown}:{port}"
        server = Server(app_of(options, worker, keys), options.limit, word=word)
        worker.failed = lambda: setattr(server, "should_exit", True)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn has drained by then, and says again what stopped it
            server.run(sockets=[listening])
        if worker.failure is not None:
            raise UsageError(f"the models could not be served: {worker.failure}") from worker.failure
        if worker.is_alive():  # it warms up, and nobody waits for that
            sys.stdout.flush()
            leave("", 0)


def check(options: Serve) -> None:
    """Raises UsageError for a value out of range."""
    least = {"slots": 1, "queue": 0, "port": 0, "replicas": 1, "max_replicas": 0, "ongoing": 1}
    for name, low in least.items():
        value = getattr(options, name)
        require(value >= low, name, value, f"a whole number >= {low}")
    check_number("port", options.port, 0, 65535, whole=True)
    check_number("limit", options.limit, 0, _DAY, f"seconds, above 0 and at most {_DAY}", above=True)
    enough = not options.max_replicas or options.max_replicas >= options.replicas
    require(enough, "max_replicas", options.max_replicas, f"{options.replicas} or more, or 0")
    if not options.ray:
        idle(options, "replicas max_replicas ongoing", "it belongs to --ray")
    if not options.max_replicas:
        idle(options, "ongoing", "it belongs to --max-replicas")
    settings_from(options, GenerateSettings)
    aliases_of(options)


def models_of(options: Serve) -> dict[str, str]:
    """What is loaded, by the name that requests use: a folder goes by its own name. Raises UsageError for two models
    of one name."""
    found: dict[str, str] = {}
    for model in options.model or ("flowers",):
        name = model_name(Path(model)) if Path(model).is_dir() else model
        if name in found:
            raise UsageError(f"model {model!r} is not allowed: there is one of that name already")
        found[name] = model
    return found


def aliases_of(options: Serve) -> dict[str, str]:
    """Models by further names. Raises UsageError for a name that is taken, or a model that is not served."""
    served, found = models_of(options), dict[str, str]()
    for text in options.alias:
        name, _, model = text.partition("=")
        if not name or model not in served:
            raise UsageError(f"alias = {text!r} is not allowed: NAME=MODEL, MODEL one of {', '.join(served)}")
        if name in served or name in found:
            raise UsageError(f"alias = {text!r} is not allowed: {name!r} is served already")
        found[name] = model
    return found


def app_of(options: Serve, worker: Worker, keys: Sequence[str], **more: Any) -> Any:
    """The HTTP app of a worker, for the hosts, aliases and keys that were asked for. more: see `make_app`."""
    hosts = tuple(name.lower() for name in options.allowed_host) or (_LOCAL if _loopback(options.host) else ())
    terms = Terms(worker, aliases_of(options), options.resize)
    return make_app(worker, keys=tuple(keys), hosts=hosts, terms=terms, **more)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def make_worker(options: Serve) -> Worker:
    """Load the models and make the worker, which is not started yet."""
    pipes: dict[str, Pipeline] = {}
    loading = loading_of(options)
    for name, model in tqdm(models_of(options).items(), desc="loading", disable=None):
        pipes[name] = load(model, loading, note)
        pipes[name].need_pictures()
    base = settings_from(options, GenerateSettings)
    for pipe in pipes.values():
        pipe.resolve(base)
    return Worker(lambda: pipes, slots=options.slots, queue=options.queue, limit=options.limit, base=base)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; so that an address that is taken is an error before models are loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise UsageError(f"host {host!r}, port {port}: cannot listen there ({error.strerror or error})") from error
