"""One image on its way from a request to its tokens."""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from bozzetto.laws.categorical import LawSettings
from bozzetto.settings import GenerateSettings

WAITING, DRAWING, DONE, CANCELLED, FAILED = "waiting", "drawing", "done", "cancelled", "failed"


@dataclass
class PassTrace:
    """One image, one entry per target pass. committed: tokens appended; accepted: how many of them were drafts;
    drafted: positions drafted (inside the image); spent: bias bound of the pass (zeros under exact rules).
    committed - accepted is 1, or 0 in a last pass that kept all drafts."""

    committed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    spent: list[float] = field(default_factory=list)

    def offsets(self) -> np.ndarray:
        """Where each token came from, int16 [N]: 0 is the target's own draw, j >= 1 the j-th draft of its pass."""
        parts = [np.zeros(0, np.int16)]
        for committed, accepted in zip(self.committed, self.accepted, strict=True):
            offset = np.arange(1, committed + 1, dtype=np.int16)
            parts.append(np.where(offset <= accepted, offset, 0).astype(np.int16))
        return np.concatenate(parts)


@dataclass(eq=False)
class ImageRequest:
    """One image to draw, and how far it is. label: class or caption number; seed, index: fix its noise; law: its own.

    From a scheduler: settings, resolved; batch: what images with equal keys may share; status: `waiting`, `drawing`,
    `done`, `cancelled` or `failed`; alone: whether its batch is its own, after the one that it shared failed; error:
    why it failed.

    count: committed tokens; passes: of the target; tokens: int64 [N] or float32 [N, D], once it is finished. The other
    figures are those of the end (`Batch.look` brings them up to date before): accepted, drafted, trace; margin, spent,
    moved, farthest: see DecodeState.
    """

    label: int
    seed: int
    index: int
    law: LawSettings
    settings: GenerateSettings | None = None
    key: Hashable = None
    alone: bool = False
    status: str = WAITING
    error: Exception | None = None
    count: int = 0
    passes: int = 0
    accepted: int = 0
    drafted: int = 0
    margin: float = float("inf")
    spent: float = 0.0
    moved: float = 0.0
    farthest: float = 0.0
    trace: PassTrace = field(default_factory=PassTrace)
    tokens: Tensor | None = field(default=None, repr=False)
    held: int = 0  # drafts that stand behind the last committed token (of a fused batch)
    noise_until: int = 0  # positions whose noise is there (of a fused batch)

    @property
    def result(self) -> Tensor:
        """The tokens of a finished image. Raises ValueError before, and of a failed one why it failed."""
        if self.error is not None:
            raise self.error
        if self.tokens is None:
            raise ValueError(f"an image that is {self.status} has no tokens yet")
        return self.tokens

    @property
    def request(self) -> ImageRequest:
        """The image itself, under its old name."""
        warnings.warn("an image is its own request now: `request` will go", DeprecationWarning, stacklevel=2)
        return self

    def begin_again(self, key: Hashable) -> None:
        """Wait once more, for a batch of its own under this key."""
        vars(self).update(vars(ImageRequest(self.label, self.seed, self.index, self.law, self.settings, key, True)))
