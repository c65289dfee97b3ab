"""What images are decoded in together: a few methods, whoever runs the passes.

`loop.py` runs them eagerly, `masked.py` those of a masked model, `fused.py` with all that follows a pass fused into it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bozzetto.decoding.images import CANCELLED, ImageRequest, PassTrace
from bozzetto.decoding.meter import Meter
from bozzetto.decoding.state import DecodeState

_FIGURES = ("passes", "accepted", "drafted", "margin", "spent", "moved", "farthest")


class Batch(ABC):
    """slots: images together; window: places of a pass, at most; places: of the last one; meter: what passes take."""

    joins = False  # whether images may enter while others are decoded

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
    """Images of one seed as rows of tensors, from beginning to end: nobody joins them.

    state: of the rows still in it; rows: the number of each in the batch; counts: its committed tokens; over: those
    that the last pass finished; final: the whole batch, up to date for rows that have left.
    """

    state: DecodeState
    final: DecodeState

    def __init__(self, target: Any, slots: int = 1 << 30, window: int = 1):
        super().__init__(target, slots, window)
        self.images: list[ImageRequest] = []
        self.rows: list[int] = []
        self.counts: list[int] = []
        self.past: list[Tensor] = []
        self.over: list[int] = []

    @abstractmethod
    def begin(self, labels: Tensor, seed: int, index: Tensor) -> None:
        """Start a batch. labels, index: int64 [B] (index: the images' numbers, which with the seed fix them)."""

    @abstractmethod
    def advance(self) -> None:
        """One target pass: brings state, counts and over up to date."""

    @abstractmethod
    def leave(self) -> None:
        """Go on without the rows that are over."""

    @property
    @abstractmethod
    def going(self) -> bool:
        """Whether some row is not finished."""

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
        while self.going:
            self.advance()
            yield
            self.leave()

    def whole(self) -> DecodeState:
        """The whole batch, in the order of its images."""
        return self.state if len(self.rows) == len(self.final.count) else self.final.merge(self.state)

    @property
    def active(self) -> int:
        return sum(image.tokens is None and image.status != CANCELLED for image in self.images)

    @property
    def free(self) -> int:
        return 0 if self.images else self.slots

    def admit(self, images: Sequence[ImageRequest]) -> None:
        """Begin a batch of images of one seed. Raises ValueError while there is one, or for several seeds."""
        if len(images) > self.free or len({image.seed for image in images}) > 1:
            raise ValueError(f"{len(images)} images for {self.free} free places, or of several seeds")
        if images:
            numbers = torch.tensor([[i.label for i in images], [i.index for i in images]], device=self.target.device)
            self.begin(numbers[0], images[0].seed, numbers[1])
            self.images, self.past = list(images), []
            self.recent: list[tuple[Tensor, ...]] = []

    def step(self) -> list[ImageRequest]:
        if not self.images:
            return []
        self.advance()
        s = self.state
        self.recent.append((s.count, s.accepted, s.drafted, s.spent))
        for row, count in zip(self.rows, self.counts, strict=True):
            image = self.images[row]
            image.passes += count > image.count
            image.count = count
        done = [self.images[self.rows[i]] for i in self.over]
        if done:
            self._report(self.over)
            self._finish(done)
        self.leave()
        if not self.active:
            self.clear()
        return [image for image in done if image.status != CANCELLED]

    def _report(self, at: Sequence[int]) -> None:
        """Tell images their figures. at: rows of the state."""
        parts = torch.stack([getattr(self.state, name).double() for name in _FIGURES], 1).tolist()
        for i in at:
            image, (passes, accepted, drafted, *bounds) = self.images[self.rows[i]], parts[i]
            image.passes, image.accepted, image.drafted = int(passes), int(accepted), int(drafted)
            image.margin, image.spent, image.moved, image.farthest = bounds

    def _finish(self, done: Sequence[ImageRequest]) -> None:
        """Give images that are over their tokens and traces, without the passes that they took no part in: those in
        which a masked model drew images that were behind."""
        new = [torch.stack(sums, 1) for sums in zip(*self.recent, strict=True)]
        self.past, self.recent = (
            [torch.cat(pair, 1) for pair in zip(self.past, new, strict=True)] if self.past else new,
            [],
        )
        over = torch.tensor(self.over).to(self.target.device)
        sums = [part.index_select(0, over).double() for part in self.past]  # of the four figures, [n, passes]
        steps = [torch.diff(part, prepend=torch.zeros_like(part[:, :1])).tolist() for part in sums]
        for at, image, *columns in zip(self.over, done, *steps, strict=True):
            took_part = [i for i, committed in enumerate(columns[0]) if committed]
            committed, accepted, drafted = ([int(column[i]) for i in took_part] for column in columns[:3])
            image.trace = PassTrace(committed, accepted, drafted, [columns[3][i] for i in took_part])
            image.tokens = self.state.tokens[at].clone()

    def look(self) -> None:
        self._report(range(len(self.rows)))

    def cancel(self, image: ImageRequest) -> None:
        """The batch goes on while somebody wants another image of it."""
        image.status = CANCELLED
        if not self.active:
            self.clear()

    def clear(self) -> None:
        self.images, self.rows, self.counts, self.past = [], [], [], []

    def tokens_of(self, image: ImageRequest) -> Tensor:
        if image.tokens is not None:
            return image.tokens
        return self.state.tokens[self.rows.index(self.images.index(image))].clone()
