"""The same app under Ray Serve: several replicas, on one machine or many. Each has models and slots of its own; which
one draws an image does not matter, because an image depends on its seed and index only."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray import serve

from bozzetto.options import Serve
from bozzetto.serve.app import make_app
from bozzetto.serve.command import hosts_of, make_worker, models_of, terms_of

_DRAIN = 60.0  # seconds that a replica which is taken down has for what it accepted


def application(options: Serve, keys: Sequence[str] = ()) -> Any:
    """A Ray Serve application, for `serve.run` or a Ray cluster's own configuration."""

    def build() -> Any:
        worker = make_worker(options)
        return make_app(worker, keys=tuple(keys), hosts=hosts_of(options), terms=terms_of(options, worker))

    count: dict[str, Any] = {"num_replicas": options.replicas}
    if options.max_replicas:
        scaling = {"min_replicas": options.replicas, "max_replicas": options.max_replicas}
        count = {"autoscaling_config": {**scaling, "target_ongoing_requests": options.ongoing}}
    deployment = serve.deployment(
        name="bozzetto",
        max_ongoing_requests=options.slots + options.queue,
        graceful_shutdown_timeout_s=_DRAIN + options.limit,
        **count,
    )(serve.ingress(build)())
    return deployment.bind()


def serve_on_ray(options: Serve, keys: Sequence[str] = (), wait: Callable[[], object] | None = None) -> None:
    """Serve until interrupted. Joins the cluster that RAY_ADDRESS names, or starts one of this machine. wait: returns
    when serving is over (None: an interrupt ends it)."""
    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        serve.start(http_options={"host": options.host, "port": options.port})
        serve.run(application(options, keys), name="bozzetto", route_prefix="/")
        what = f"{options.replicas} replicas of {', '.join(models_of(options))}"
        print(f"serving {what} at http://{options.host}:{options.port}", flush=True)
        (wait or threading.Event().wait)()
    except KeyboardInterrupt:
        pass
    finally:
        serve.shutdown()
        if ours:
            ray.shutdown()
