"""What a server tells Prometheus."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from bozzetto.decoding.images import ImageRequest

_IMAGES = (1, 2, 4, 8, 16, 32)
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter, histogram = partial(Counter, registry=self.registry), partial(Histogram, registry=self.registry)
        self.queue = Gauge("bozzetto_images_in_system", "Images that wait or are drawn", registry=self.registry)
        self.requests = counter("bozzetto_requests", "Requests by answer", ["path", "status"])
        about = "From a request to the end of its answer"
        self.latency = histogram("bozzetto_request_seconds", about, ["path"], buckets=_SECONDS)
        self.batch = histogram("bozzetto_batch_images", "Images in a target pass", ["model"], buckets=_IMAGES)
        self.pass_seconds = counter("bozzetto_pass_seconds", "Time in target passes", ["model"])
        about = "From an image's first pass to its last"
        self.image_seconds = histogram("bozzetto_image_seconds", about, ["model"], buckets=_SECONDS)
        named = {
            "images": "Images finished",
            "tokens": "Tokens of finished images",
            "passes": "Target passes of finished images; tokens over passes is the gain of speculation",
            "drafted": "Drafted tokens of finished images",
            "accepted": "Accepted tokens among them",
        }
        self.totals = {name: counter(f"bozzetto_{name}", about, ["model"]) for name, about in named.items()}

    def waiting(self, images: int) -> None:
        """Images in the system now."""
        self.queue.set(images)

    def passed(self, model: str, images: int, seconds: float) -> None:
        """A target pass is done."""
        self.batch.labels(model).observe(images)
        self.pass_seconds.labels(model).inc(seconds)

    def finished(self, model: str, image: ImageRequest, seconds: float) -> None:
        """An image is done."""
        self.image_seconds.labels(model).observe(seconds)
        counts = {"images": 1, "tokens": image.count}
        counts |= {name: getattr(image, name) for name in ("passes", "drafted", "accepted")}
        for name, value in counts.items():
            self.totals[name].labels(model).inc(value)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """A request is over."""
        self.requests.labels(path, str(status)).inc()
        self.latency.labels(path).observe(seconds)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
