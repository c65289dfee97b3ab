"""What is asked of a pipeline and what it gives: a plan of batches, images, a result, events of a stream."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from bozzetto.decoding.batch import Batch
from bozzetto.decoding.images import ImageRequest, PassTrace
from bozzetto.errors import UsageError, check_number, check_text
from bozzetto.settings import GenerateSettings

# Two candidates closer than this (in perturbed log-probability) may swap when a pass has another shape.
ROUNDING = {"float32": 1e-4, "bfloat16": 0.25, "float16": 0.04}
MOST = 2**63  # seeds and indices are below
T = TypeVar("T")


@dataclass
class GeneratedImage:
    """One image and how it came about. tokens: int64 [N] or float32 [N, D]; sha256: of the RGB pixel bytes; margin: the
    least log-probability by which a draw or coin would have fallen otherwise (None: not measured); near_tie: that is
    within what passes of another shape round otherwise; spent: bias bound summed over the tokens (0 for exact rules);
    moved, farthest: mean and largest distance of continuous tokens from the target's own samples, in token units (0
    where the rule measures none); trace: what each target pass offered and kept; prompt: what the model was asked,
    which may be more than class_name."""

    image: Image.Image
    tokens: Tensor
    class_name: str
    label: int
    seed: int
    index: int
    sha256: str
    target_passes: int
    accepted: int
    drafted: int
    margin: float | None
    near_tie: bool
    spent: float
    trace: PassTrace
    moved: float = 0.0
    farthest: float = 0.0
    prompt: str = ""

    @staticmethod
    def of(pipe: Any, image: ImageRequest, picture: Image.Image) -> GeneratedImage:
        """A finished image of a pipeline and its picture."""
        measured = image.margin < float("inf")
        return GeneratedImage(
            image=picture,
            tokens=image.result.cpu(),
            class_name=pipe.classes[image.label],
            prompt=pipe.prompt_of(image.label),
            label=image.label,
            seed=image.seed,
            index=image.index,
            sha256=hashlib.sha256(picture.tobytes()).hexdigest(),
            target_passes=image.passes,
            accepted=image.accepted,
            drafted=image.drafted,
            margin=image.margin if measured else None,
            near_tie=measured and image.margin < pipe.rounding(image.settings),
            spent=image.spent,
            trace=image.trace,
            moved=image.moved / pipe.target.length,
            farthest=image.farthest,
        )


@dataclass
class GenerateResult:
    """images in index order (none where somebody took them); seconds: total, target (passes), draft (drafting and
    verifying), decode (pixels); head_calls, head_rows: serial calls of a denoising head and rows in them, over all
    batches (0 for codes); count, tokens, passes: how many of each there were in all."""

    images: list[GeneratedImage]
    settings: GenerateSettings
    windows: list[int]
    seconds: dict[str, float] = field(default_factory=dict)
    head_calls: int = 0
    head_rows: int = 0
    count: int = 0
    tokens: int = 0
    passes: int = 0

    def add(self, image: GeneratedImage) -> None:
        """Count one more."""
        self.count, self.tokens = self.count + 1, self.tokens + len(image.tokens)
        self.passes += image.target_passes

    def note(self, batch: Batch) -> None:
        """Add what a batch took."""
        self.windows.append(batch.window)
        for part, seconds in batch.meter.parts.items():
            self.seconds[part] += seconds
        self.head_calls += batch.meter.head_calls
        self.head_rows += batch.meter.head_rows

    @property
    def tokens_per_pass(self) -> float:
        """Tokens per target pass, averaged over images."""
        return self.tokens / max(1, self.passes)


@dataclass
class StreamEvent:
    """After one target pass of a batch. tokens: int64 [B, N] or float32 [B, N, D] of the whole batch (zeros beyond what
    is committed); count: int64 [B], committed tokens per image; accepted, drafted: int64 [B], drafts kept and positions
    drafted so far (a tree drafts as many positions as it is deep); spent: float32 [B], bias bound so far; margin:
    float32 [B], the least one so far (see GeneratedImage; infinite: not measured); number: passes so far; width: places
    scored in this pass; seconds: wall time of this pass; known: bool [B, N], which places are committed (masked models;
    None: the first `count`); indices, class_names: which images these are."""

    tokens: Tensor
    count: Tensor
    accepted: Tensor
    drafted: Tensor
    spent: Tensor
    margin: Tensor
    number: int
    width: int
    seconds: float
    known: Tensor | None
    indices: list[int]
    class_names: list[str]

    @staticmethod
    def of(images: Sequence[ImageRequest], batch: Batch, names: list[str], seconds: float) -> StreamEvent:
        """After a pass of a batch that took so long."""
        batch.look()
        tokens = torch.stack([batch.tokens_of(image) for image in images])
        figures = {
            name: torch.tensor([getattr(image, name) for image in images], device=tokens.device)
            for name in ("count", "accepted", "drafted", "spent", "margin")
        }
        known = [part for image in images if (part := batch.known_of(image)) is not None]
        return StreamEvent(
            tokens,
            **figures,
            number=batch.meter.passes,
            width=batch.places,
            seconds=seconds,
            known=torch.stack(known) if known else None,
            indices=[image.index for image in images],
            class_names=names,
        )


def plan_batches(
    labels: Sequence[int],
    count: int | None,
    seed: int,
    first_index: int,
    batch: int,
    indices: Sequence[int] | None = None,
) -> tuple[int, Iterator[tuple[list[int], list[int]]]]:
    """How many images a request is for, and the (indices, labels) of one batch after the other, made when they are
    asked for: labels are taken in turn by index. count None: one image per label; `indices` in place of a first one
    and a count; batch: how many at a time.

    Raises UsageError for a value out of range.
    """
    if indices is not None:
        count, first_index = len(indices), min(indices, default=0)
    count = len(labels) if count is None else count
    check_number("count", count, 1, MOST - 1, "a whole number >= 1", whole=True)
    check_number("seed", seed, 0, MOST - 1, "a whole number from 0 to 2^63 - 1", whole=True)
    check_number("first_index", first_index, 0, MOST - count, "a whole number >= 0, with no index above 2^63 - 1", True)
    drawn = range(first_index, first_index + count) if indices is None else indices
    chunks = (list(drawn[first : first + batch]) for first in range(0, count, batch))
    return count, ((chunk, [labels[index % len(labels)] for index in chunk]) for chunk in chunks)


def settings_of(kind: type[T], settings: T | None, options: Mapping[str, Any]) -> T:
    """Settings of this kind as given, or made of single options. Raises UsageError for both, or for an unknown
    option."""
    if settings is not None and options:
        raise UsageError(f"give either settings or single options, not both: {', '.join(options)}")
    allowed = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    if unknown := next((name for name in options if name not in allowed), ""):
        raise UsageError(f"unknown option {unknown!r} (allowed: {', '.join(allowed)})")
    return kind(**options) if settings is None else settings


def listed(asked: str | int | Iterable[str | int]) -> Sequence[str | int]:
    """One text or number as a list of one (a text is a sequence too, of letters); an iterator as what it gives. Raises
    UsageError for what is neither, and for a text that cannot be written (not UTF-8 on the command line)."""
    if isinstance(asked, bytes) or not isinstance(asked, str | int | Iterable):
        raise UsageError(f"classes = {asked!r} is not allowed: names, numbers or prompts, one or a list of them")
    found = (asked,) if isinstance(asked, str | int) else tuple(asked)
    for item in found:
        if isinstance(item, str):
            check_text("class or prompt", item)
    return found
