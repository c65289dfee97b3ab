"""What is asked of the thread that decodes, and what it tells."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from PIL import Image

from bozzetto.checkpoints.load_settings import written
from bozzetto.decoding.images import ImageRequest
from bozzetto.settings import GenerateSettings


@dataclass(frozen=True)
class Order:
    """The images that one request asks for: 0..count-1 of a seed. partials: pictures on the way; watched: whether
    pictures on the way are sent; size: width and height where they are not the model's own.

    How pictures are sent: pixels: their width and height; scaled: whether the model draws another size; kind: png, jpeg
    or webp; link: as a data URL; strength: quality from 0 to 100, None: what suits the kind."""

    model: str
    prompt: str
    settings: GenerateSettings
    seed: int
    count: int = 1
    partials: int = 0
    watched: bool = False
    size: tuple[int, int] | None = None
    pixels: tuple[int, int] | None = None
    scaled: bool = False
    kind: str = "png"
    link: bool = False
    strength: int | None = None

    @property
    def place(self) -> str:
        """What its images share passes with: those of a model, of one size."""
        return self.model if self.size is None else f"{self.model} {written(self.size)}"


@dataclass(frozen=True)
class Partial:
    """A picture on the way of image `index`, grey where nothing is drawn yet. number: which one of those that an order
    asks for (None: of those for who watches); seconds: since the image's first pass; done: tokens."""

    index: int
    number: int | None
    seconds: float
    done: int
    passes: int
    picture: Image.Image


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


Event = Partial | Finished | Exception  # an exception: the order comes to nothing, and why


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
