"""What is asked of the thread that decodes, and what it tells."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from bozzetto.decoding.images import ImageRequest
from bozzetto.settings import GenerateSettings


@dataclass(frozen=True)
class Order:
    """The images that one request asks for: 0..count-1 of a seed. partials: pictures on the way; watched: whether every
    pass is told; size: width and height where they are not the model's own."""

    model: str
    prompt: str
    settings: GenerateSettings
    seed: int
    count: int = 1
    partials: int = 0
    watched: bool = False
    size: tuple[int, int] | None = None

    @property
    def place(self) -> str:
        """What its images share passes with: those of a model, of one size."""
        return self.model if self.size is None else f"{self.model} {self.size[0]}x{self.size[1]}"


@dataclass(frozen=True)
class Partial:
    """A picture on the way: the `number`-th of image `index`, grey where nothing is drawn yet."""

    index: int
    number: int
    picture: Image.Image


@dataclass(frozen=True)
class Progress:
    """What passes did since the last one told. seconds: since the image's first pass; done: tokens."""

    index: int
    seconds: float
    done: int
    passes: int
    picture: Image.Image | None


@dataclass(frozen=True)
class Finished:
    """An image. seconds: from its first pass to its last; near_tie: whether rounding in other company could have turned
    it into another one (None: not measured)."""

    image: ImageRequest
    picture: Image.Image
    seconds: float
    near_tie: bool | None = None

    @property
    def index(self) -> int:
        return self.image.index


@dataclass(frozen=True)
class Failed:
    """The order comes to nothing."""

    error: Exception


class Busy(Exception):
    """The queue is full. seconds: after which it is worth trying again."""

    def __init__(self, seconds: int):
        super().__init__(f"the server is busy: try again in {seconds} s")
        self.seconds = seconds


class TooLong(Exception):
    """An order took longer than a request may."""


Event = Partial | Progress | Finished | Failed
