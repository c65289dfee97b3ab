"""What recipes are made of: numbers with their ranges, paths, sets of pictures, and how they go together."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked

from bozzetto.autoencoders.tiny import DOWNSAMPLE
from bozzetto.data import ImageSet, read_images

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
Count = Annotated[int, Field(gt=0, le=10**9)]
Width = Annotated[int, Field(gt=0, le=2**16)]  # of a layer, or how many of them
Times = Annotated[int, Field(ge=0, le=10**9)]
Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Scale = Annotated[float, Field(ge=1)]
Place = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]  # a path, or a model's name
Side = Annotated[int, Field(ge=2 * DOWNSAMPLE, le=4096, multiple_of=DOWNSAMPLE)]  # pixels; the tiny autoencoder's


@checked(frozen=True, config=STRICT)
class DataSource:
    """path: of parquet files or pictures (docs/data.md); split: which of them (None: all); size: pixels that squares
    are held at, from which random crops are taken (None: a quarter more than the model's, at least 160)."""

    path: Place
    split: str | None = None
    size: Annotated[int, Field(gt=0, le=4096)] | None = None

    def __str__(self) -> str:
        return self.path if self.split is None else f"{self.path} (split {self.split})"

    def read(self, image_size: int = 128) -> ImageSet:
        """The images, for a model of pictures of `image_size` pixels."""
        return read_images(self.path, self.split, self.size or max(160, image_size * 5 // 4))

    def overlaps(self, other: DataSource) -> bool:
        """Whether both name the same pictures, or one all and the other some of them."""
        return self.path == other.path and (None in (self.split, other.split) or self.split == other.split)


def note_overlap(train: Sequence[DataSource], test: DataSource) -> None:
    """Say it on stderr where pictures that are held out are trained on as well."""
    if any(source.overlaps(test) for source in train):
        line = f"note: {test}: trained on as well; held-out figures say nothing about new pictures"
        print(line, file=sys.stderr, flush=True)


def check_heads(dim: int, heads: int, turns: int = 1) -> None:
    """Raise ValueError where heads do not share dim evenly, or a head's share is no multiple of `turns`."""
    if dim % heads or dim // heads % turns:
        shares = f"multiples of {turns}" if turns > 1 else "equal"
        raise ValueError(f"dim = {dim} with heads = {heads} is not allowed: dim / heads must be whole, shares {shares}")


def check_guidance(guidance: tuple[float, float]) -> None:
    """Raise ValueError for a range that ends before it begins."""
    if guidance[0] > guidance[1]:
        raise ValueError(f"guidance = {list(guidance)} is not allowed: [lowest, highest]")


def check_weighted(**weights: float) -> None:
    """Raise ValueError where a loss weighs nothing."""
    if not any(weights.values()):
        raise ValueError(f"{' = '.join(weights)} = 0 is not allowed: one of them must be > 0, or nothing is learnt")


def check_prompts(prompts: tuple[str, ...]) -> None:
    """Raise ValueError for a prompt that names anything but {caption} and {style}."""
    for prompt in prompts:
        try:
            prompt.format(caption="", style="")
        except (LookupError, ValueError, AttributeError) as error:
            raise ValueError(f"prompts: {prompt!r} is not allowed: only {{caption}} and {{style}} in braces") from error


def check_sizes(image_size: int, *sources: DataSource) -> None:
    """Raise ValueError where pictures of `image_size` pixels would be enlarged ones."""
    for source in sources:
        if source.size is not None and source.size < image_size:
            raise ValueError(f"{source}: size = {source.size} is not allowed: at least image_size = {image_size}")
