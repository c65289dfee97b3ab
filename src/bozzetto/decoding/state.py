"""What changes while a batch is decoded: tensors with a row per image."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bozzetto.laws.noise import STREAM_VERIFY, image_keys


@dataclass
class DecodeState:
    """Everything that changes while a batch is decoded; rows are the images still in progress.

    tokens: int64 [B, N] or float32 [B, N, D], committed raster tokens, zeros beyond; count: int64 [B], how many are
    committed; row: int64 [B], where the image stands in the whole batch; keys: int64 [B], noise keys of the
    verifier; passes, drafted, accepted: int64 [B].

    Statistics, float32 [B]: margin, how near any draw or coin came to falling otherwise; spent, bias bound summed over
    tokens (relaxed rules); moved, farthest: distance of continuous tokens from the target's own samples, sum and
    largest.
    """

    tokens: Tensor
    count: Tensor
    row: Tensor
    keys: Tensor
    passes: Tensor
    drafted: Tensor
    accepted: Tensor
    margin: Tensor
    spent: Tensor
    moved: Tensor
    farthest: Tensor

    @staticmethod
    def new(seed: int, index: Tensor, tokens: Tensor) -> DecodeState:
        """tokens: the blank ones."""
        batch, device = len(index), index.device
        zeros = torch.zeros(batch, dtype=torch.int64, device=device)
        nothing = torch.zeros(batch, device=device)
        return DecodeState(
            tokens=tokens,
            count=zeros,
            row=torch.arange(batch, device=device),
            keys=image_keys(seed, STREAM_VERIFY, index),
            passes=zeros,
            drafted=zeros,
            accepted=zeros,
            margin=torch.full((batch,), float("inf"), device=device),
            spent=nothing,
            moved=nothing,
            farthest=nothing,
        )

    @property
    def length(self) -> int:
        """Tokens of an image, N."""
        return self.tokens.shape[1]

    def keep(self, rows: Tensor) -> DecodeState:
        """The given rows int64 [B']."""
        return DecodeState(**{name: value[rows] for name, value in vars(self).items()})

    def last(self) -> Tensor:
        """The last committed token of each image (anything, before the first), [B, 1, ...]."""
        rows = torch.arange(len(self.count), device=self.count.device)
        return self.tokens[rows, (self.count - 1).clamp_min(0)][:, None]

    def append(self, tokens: Tensor, fresh: Tensor, **others: Tensor) -> DecodeState:
        """With tokens [B, L, ...] after the committed ones where fresh (bool [B, L]), never past the end of the image;
        others: new values of other fields."""
        offset = torch.arange(fresh.shape[1], device=fresh.device)
        # Columns past the committed ones are sent to a spare column that is cut off again.
        column = (self.count[:, None] + offset).masked_fill(~fresh, self.length)
        spare = torch.zeros_like(self.tokens[:, :1])
        padded = torch.cat([self.tokens, spare], 1)
        padded[torch.arange(len(fresh), device=fresh.device)[:, None], column] = tokens
        return replace(self, tokens=padded[:, : self.length], **others)

    def merge(self, part: DecodeState) -> DecodeState:
        """The whole batch with the rows still in progress brought up to date."""
        merged = {}
        for name, value in vars(self).items():
            merged[name] = value.clone()
            merged[name][part.row] = getattr(part, name)
        return DecodeState(**merged)
