"""Orders on their way through the thread that decodes, and their images."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from bozzetto.decoding.images import ImageRequest
from bozzetto.serve.orders import Event, Order


@dataclass(eq=False)
class Drawn:
    """An image of an order on its way. began: when its first pass did; told: partial pictures so far; shown: when it
    was watched last; painting: the last picture of it that was handed to the painters."""

    job: Job
    image: ImageRequest
    began: float | None = None
    told: int = 0
    shown: float = 0.0
    watching: bool = False  # a picture for who watches is being made
    painting: Future[None] | None = None


@dataclass(eq=False)
class Job:
    """An order on its way. post: is told events, from any thread; accept: called before them, once it is known that
    the order can be drawn; left: images that are not finished."""

    order: Order
    post: Callable[[Event], None]
    accept: Callable[[], None]
    due: float
    left: int
    images: list[Drawn] = field(default_factory=list)
    over: bool = False
