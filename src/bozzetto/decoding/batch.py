"""What images are decoded in together: a few methods, whoever runs the passes.

`loop.py` runs them eagerly, `masked.py` those of a masked model, `fused.py` with all that follows a pass fused into it.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bozzetto.decoding.images import CANCELLED, ImageRequest
from bozzetto.decoding.meter import Meter
from bozzetto.decoding.state import DecodeState

_FIGURES = ("margin", "moved", "farthest")


class Batch(ABC):
    """slots: images together; window: places of a pass, at most; places: of the last one; meter: what passes take."""

    prepared = False  # whether making one takes long

    def __init__(self, target: Any, slots: int, window: int):
        self.target, self.slots, self.window = target, slots, window
        self.places, self.meter = window, Meter(target.device)

    @property
    @abstractmethod
    def active(self) -> int:
        """Images that are being decoded and wanted."""

    @property
    @abstractmethod
    def free(self) -> int:
        """Images that could enter now."""

    @abstractmethod
    def admit(self, images: Sequence[ImageRequest]) -> None:
        """Let images enter. Raises ValueError for more than are free, or what they cannot share."""

    @abstractmethod
    def step(self) -> list[ImageRequest]:
        """One target pass; returns the images that it finished."""

    @abstractmethod
    def cancel(self, image: ImageRequest) -> None:
        """An image is not wanted any more."""

    @abstractmethod
    def tokens_of(self, image: ImageRequest) -> Tensor:
        """What an image has so far, [N, ...], zeros where there is nothing yet."""

    @abstractmethod
    def clear(self) -> None:
        """Give up all images."""

    def known_of(self, image: ImageRequest) -> Tensor | None:
        """Which of them an image has, bool [N], where they do not come in order."""
        return None

    def look(self) -> None:  # noqa: B027  (of a fused batch they always are)
        """Bring the figures of all images up to date."""

    def shrink(self) -> None:  # noqa: B027
        """Give up what is held for images that will not come."""


class RowBatch(Batch):
    """Images as rows of tensors. Those that enter while others are drawn are a batch of their own before they join.

    state, counts: of the rows still in it, and their committed tokens; told: see `DecodeState.told`; over: rows that
    the last pass finished; images: of the rows, where they have some; newer: batches that have not joined; final: of
    `passes` and `run`, the whole batch, up to date for rows that have left.
    """

    state: DecodeState
    final: DecodeState
    told: list[list[float]]

    def __init__(self, target: Any, slots: int = 1 << 30, window: int = 1):
        super().__init__(target, slots, window)
        self.images: list[ImageRequest] = []
        self.newer: list[Any] = []
        self.counts: list[int] = []
        self.over: list[int] = []

    @property
    def joins(self) -> bool:
        """Whether others may enter."""
        return True

    @abstractmethod
    def begin(self, labels: Tensor, seed: int | Tensor, index: Tensor) -> None:
        """Start a batch. labels, index: int64 [B] (index: the images' numbers, which with the seed, of all or int64
        [B], fix them)."""

    @abstractmethod
    def advance(self) -> None:
        """One target pass: brings state, counts, told and over up to date."""

    @abstractmethod
    def keep(self, going: list[int]) -> None:
        """Go on with these rows."""

    def another(self) -> Any:
        """The same without images."""
        other = copy.copy(self)
        other.images, other.newer, other.counts, other.over = [], [], [], []
        return other

    @abstractmethod
    def join(self, other: Any) -> None:
        """Have the rows of another one behind these."""

    def passes(self, labels: Tensor, seed: int, index: Tensor) -> Iterator[DecodeState]:
        """Decode to the end, arguments as in `begin`; yields the whole batch after every pass."""
        for _ in self._decode(labels, seed, index):
            yield self.whole()

    def run(self, labels: Tensor, seed: int, index: Tensor) -> DecodeState:
        """Decode to the end, arguments as in `begin`; `meter` says what it took."""
        for _ in self._decode(labels, seed, index):
            pass
        return self.whole()

    def _decode(self, labels: Tensor, seed: int, index: Tensor) -> Iterator[None]:
        self.meter = Meter(self.target.device)
        self.begin(labels, seed, index)
        self.final = self.state
        while self.counts:
            self.advance()
            yield
            if self.over:
                self.final = self.whole()
                self._leave()

    def whole(self) -> DecodeState:
        """The whole batch, in the order of its images."""
        return self.state if len(self.counts) == len(self.final.count) else self.final.merge(self.state)

    def _leave(self) -> None:
        over = set(self.over)
        self.keep([i for i in range(len(self.counts)) if i not in over])

    @property
    def active(self) -> int:
        return sum(len(part.images) for part in (self, *self.newer))

    @property
    def free(self) -> int:
        return self.slots - self.active if self.joins or not self.active else 0

    def admit(self, images: Sequence[ImageRequest]) -> None:
        """Images enter. Raises ValueError for more than are free."""
        if len(images) > self.free:
            raise ValueError(f"{len(images)} images for {self.free} free places")
        if not images:
            return
        numbers = torch.tensor([[i.label, i.seed, i.index] for i in images], device=self.target.device)
        part = self.another() if self.images else self
        part.begin(*numbers.T.contiguous())
        part.images = list(images)
        if part is not self:
            self.newer.append(part)

    def step(self) -> list[ImageRequest]:
        part = self.newer.pop(0) if self.newer else self
        if not part.images:
            return []
        part.advance()
        self.places = part.places
        done = part._note()
        if part is not self and part.images:
            self._take(part)
        return done

    def _take(self, part: Any) -> None:
        if self.images:
            self.join(part)
            self.images += part.images
        else:
            vars(self).update({**vars(part), "newer": self.newer, "meter": self.meter})

    def _note(self) -> list[ImageRequest]:
        """Tell images what the pass brought; those that are over get their tokens and leave."""
        columns = [*self.told, *[[0.0] * len(self.counts)] * (5 - len(self.told))]
        for image, count, passes, accepted, drafted, spent in zip(self.images, *columns, strict=True):
            if count == image.count:  # a masked model has drawn images that were behind
                continue
            image.trace.committed.append(int(count) - image.count)
            image.trace.accepted.append(int(accepted) - image.accepted)
            image.trace.drafted.append(int(drafted) - image.drafted)
            image.trace.spent.append(max(0.0, spent - image.spent))
            image.count, image.passes, image.accepted = int(count), int(passes), int(accepted)
            image.drafted, image.spent = int(drafted), max(spent, image.spent)
        if not self.over:
            return []
        self._report(self.over)
        done = [self.images[i] for i in self.over]
        for i, image in zip(self.over, done, strict=True):
            image.tokens = self.state.tokens[i].clone()
        over = set(self.over)
        self.images = [image for i, image in enumerate(self.images) if i not in over]
        self._leave()
        return [image for image in done if image.status != CANCELLED]

    def _report(self, at: Sequence[int]) -> None:
        """Tell images their statistics. at: rows of the state."""
        parts = torch.stack([getattr(self.state, name).double() for name in _FIGURES], 1).tolist()
        for i in at:
            image = self.images[i]
            image.margin, image.moved, image.farthest = parts[i]

    def look(self) -> None:
        for part in (self, *self.newer):
            if part.images:
                part._report(range(len(part.images)))

    def cancel(self, image: ImageRequest) -> None:
        """The others go on without it."""
        image.status = CANCELLED
        for part in (self, *self.newer):
            if image in part.images:
                going = [i for i, other in enumerate(part.images) if other is not image]
                part.images = [part.images[i] for i in going]
                part.keep(going)
        self.newer = [part for part in self.newer if part.images]

    def clear(self) -> None:
        if self.images:
            self.keep([])
        self.images, self.newer, self.over = [], [], []

    def tokens_of(self, image: ImageRequest) -> Tensor:
        if image.tokens is not None:
            return image.tokens
        part, row = self._of(image)
        return part.state.tokens[row].clone()

    def _of(self, image: ImageRequest) -> tuple[Any, int]:
        """The batch that it is in, and its row there."""
        part = next(part for part in (self, *self.newer) if image in part.images)
        return part, part.images.index(image)
