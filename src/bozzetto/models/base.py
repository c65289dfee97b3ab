"""What the engine asks of a target model."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Session(Protocol):
    """One batch of images being decoded: the target's cache and conditions.

    Inputs are numbered like this: input 0 is the last condition token, input i >= 1 carries image token i - 1; the
    output at input i is the law of token i. Scoring writes the cache at the inputs' own slots, so a rejected draft
    costs nothing to undo: its slots are written again before anything can see them.
    """

    def score(self, inputs: Tensor, start: Tensor, furthest: int | None = None) -> Tensor:
        """One target pass. inputs int64 [B, W]: tokens at inputs start..start + W - 1 (the value at input 0 is
        ignored); start int64 [B]; furthest: the largest start where the host knows it, so that cache columns that no
        image has reached can be left out. Returns raw logits [B, W, V], or [2B, W, V] = [cond; uncond] rows when
        guided."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Drop finished images: keep the given batch rows int64 [B']."""
        ...


class Target(Protocol):
    """A model with a codebook of `vocab` tokens and `length` tokens per image."""

    vocab: int
    length: int
    device: torch.device

    def begin(self, labels: Tensor, guided: bool, max_width: int) -> Session:
        """Start a batch. labels int64 [B]; guided: also keep unconditional rows; max_width: widest later pass."""
        ...
