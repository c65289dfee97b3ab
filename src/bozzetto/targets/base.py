"""What the engine asks of a target model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bozzetto.drafts import Layout


@dataclass
class Scores:
    """What one pass gives. logits: raw, float32 [B, W, V], or [2B, W, V] = [cond; uncond] rows when guided, None for
    continuous tokens; features: [R, W, d] in the same rows, what the head sees (drafters may learn from them; heads of
    continuous tokens are run on them), or None."""

    logits: Tensor | None
    features: Tensor | None = None


class Session(Protocol):
    """One batch of images being decoded: the target's cache and conditions.

    Inputs are numbered like this: input 0 is the last condition token, input i >= 1 carries image token i - 1; the
    output at input i is the law of token i. Scoring writes the cache at the inputs' own slots, so a rejected draft
    costs nothing to undo: its slots are written again before anything can see them.
    """

    def score(self, inputs: Tensor, start: Tensor, furthest: int | None = None, layout: Layout | None = None) -> Scores:
        """One target pass. inputs int64 [B, W]: tokens at inputs start..start + W - 1 (the value at input 0 is
        ignored); start int64 [B]; furthest: the largest start where the host knows it, so that cache columns that no
        image has reached can be left out; layout: slots, positions and sight of the inputs where they are a tree."""
        ...

    def compact(self, path: Tensor, start: Tensor) -> None:
        """After a pass over a tree: move what lies at slots start + path[:, t] to start + t. path int64 [B, P]."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Drop finished images: keep the given batch rows int64 [B'], of which some may be the same."""
        ...

    def join(self, other: Any) -> None:
        """Have another session's images, begun alike, behind these."""
        ...

    def admit(self, rows: Tensor, labels: Tensor) -> None:
        """Give batch rows int64 [n] to new images of labels int64 [n]; what they held is forgotten."""
        ...


class Target(Protocol):
    """A model of `length` tokens per image. tokens: their kind, `codes` (of a codebook of `vocab`) or `vectors`; own:
    whether its passes are those of our kernels."""

    tokens: str
    vocab: int
    length: int
    own: bool
    device: torch.device

    def begin(self, labels: Tensor, guided: bool, max_width: int) -> Session:
        """Start a batch. labels int64 [B]; guided: also keep unconditional rows; max_width: widest later pass."""
        ...
