"""What a server tells Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from bozzetto.decoding.images import ImageRequest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        at = {"registry": self.registry}
        self.queue = Gauge("bozzetto_images_in_system", "Images that wait or are drawn", **at)  # type: ignore[arg-type]
        self.requests = Counter("bozzetto_requests", "Requests by answer", ["path", "status"], **at)  # type: ignore[arg-type]
        self.latency = Histogram(
            "bozzetto_request_seconds",
            "From a request to the end of its answer",
            ["path"],
            buckets=_SECONDS,
            **at,  # type: ignore[arg-type]
        )
        self.batch = Histogram(
            "bozzetto_batch_images",
            "Images in a target pass",
            ["model"],
            buckets=(1, 2, 4, 8, 16, 32),
            **at,  # type: ignore[arg-type]
        )
        self.pass_seconds = Counter("bozzetto_pass_seconds", "Time in target passes", ["model"], **at)  # type: ignore[arg-type]
        self.image_seconds = Histogram(
            "bozzetto_image_seconds",
            "From an image's first pass to its last",
            ["model"],
            buckets=_SECONDS,
            **at,  # type: ignore[arg-type]
        )
        named = {
            "images": "Images finished",
            "tokens": "Tokens of finished images",
            "passes": "Target passes of finished images; tokens over passes is the gain of speculation",
            "drafted": "Drafted tokens of finished images",
            "accepted": "Accepted tokens among them",
        }
        self.totals = {
            name: Counter(f"bozzetto_{name}", about, ["model"], **at)  # type: ignore[arg-type]
            for name, about in named.items()
        }

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
