"""The same app under Ray Serve: several replicas, on one machine or many. Each has models and slots of its own; which
one draws an image does not matter, because an image depends on its seed and index only."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray import serve

from bozzetto.checkpoints.load_settings import LoadSettings, check_gpus, gpus_of
from bozzetto.cli.options import Serve, settings_from
from bozzetto.cli.serve import app_of, make_worker, models_of
from bozzetto.cli.signals import signals
from bozzetto.errors import UsageError
from bozzetto.serve.server import GRACE, stopper

# Requests at a replica at a time, and beyond them at the proxy. Ray Serve (2.60.0) keeps what a replica may not have
# in a queue of its own, which has no limit and answers nobody, not even /health; where it is given one it says 503 in
# plain text. So our own queue has to be the one that is full first: it says 429, when to come again, and at once.
_ONGOING, _QUEUED = 1000, 1000


class Replica:
    """Has an app with models of its own; Ray takes it down and makes another one when its health is bad."""

    app: Any  # set by Ray

    def check_health(self) -> None:
        """Called by Ray. Raises RuntimeError where nothing can be drawn."""
        if complaint := self.app.state.worker.complaint():
            raise RuntimeError(complaint)


def application(options: Serve, keys: Sequence[str] = ()) -> Any:
    """A Ray Serve application, for `serve.run` or a Ray cluster's own configuration."""

    def build() -> Any:
        return app_of(options, make_worker(options), keys, wait=True)

    count: dict[str, Any] = {"num_replicas": options.replicas}
    if options.max_replicas:
        scaling = {"min_replicas": options.replicas, "max_replicas": options.max_replicas}
        count = {"autoscaling_config": {**scaling, "target_ongoing_requests": options.ongoing}}
    deployment = serve.deployment(
        name="bozzetto",
        # More than a replica takes, by as many as may be told so.
        max_ongoing_requests=max(options.slots + options.queue, options.ongoing) + _ONGOING,
        max_queued_requests=_QUEUED,
        graceful_shutdown_timeout_s=options.limit + GRACE,
        ray_actor_options={"num_gpus": gpus_of(settings_from(options, LoadSettings))},
        **count,
    )(serve.ingress(build)(Replica))
    return deployment.bind()


def serve_on_ray(options: Serve, keys: Sequence[str] = (), wait: Callable[[], object] | None = None) -> None:
    """Serve until told to stop; what was accepted is drawn. Joins the cluster that RAY_ADDRESS names, or starts one of
    this machine. wait: returns when serving is over (None: a signal ends it). Raises UsageError for models that cannot
    be served."""
    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    told = threading.Event()
    try:
        http = {"host": options.host, "port": options.port, "request_timeout_s": options.limit + GRACE}
        gpus = gpus_of(settings_from(options, LoadSettings)) * max(options.replicas, options.max_replicas)
        check_gpus(gpus, f"{max(options.replicas, options.max_replicas)} replicas", ray.cluster_resources())
        serve.start(http_options=http)
        try:
            serve.run(application(options, keys), name="bozzetto", route_prefix="/")
        except RuntimeError as error:
            raise UsageError(f"the models could not be served: {error}") from error
        what = f"{options.replicas} replicas of {', '.join(models_of(options))}"
        # A driver that has started a cluster would else kill it at SIGTERM, with what is drawn, and abort (Ray 2.60.0
        # has a handler of its own).
        with signals(stopper(options.limit + GRACE, told), signal.SIGINT, signal.SIGTERM):
            print(f"serving {what} at http://{options.host}:{options.port}", flush=True)
            (wait or told.wait)()
            _drain(options.limit + GRACE)
    finally:
        serve.shutdown()
        if ours:
            ray.shutdown()


def _drain(seconds: float) -> None:
    """Let replicas finish, while the proxy still answers (serve.shutdown alone gives them 30 s)."""
    end = time.monotonic() + seconds
    serve.delete("bozzetto", _blocking=False)
    while "bozzetto" in serve.status().applications and time.monotonic() < end:
        time.sleep(0.2)
