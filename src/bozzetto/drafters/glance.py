"""A drafter without attention, for passes that are cheap: the last feature and what lies around each place, no more.

Features of the next K places come from the target's feature f_a of the last committed pair (drafters/parallel.py), the
token x_a that followed it, and the committed tokens and features of the row above each place, all of them narrow; a
low-rank table tells each law which token was drawn just before (DSpark's). The row above says much of what attention
would find out (ZipAR, arXiv 2412.04062; Hawk, arXiv 2510.25739), and the laws of all places cost one small network and
one product with the head. It keeps two rows of narrow numbers, so that it can be compiled into the pass itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.common.checks import Grid, Layers, Size
from bozzetto.drafters.parallel import check_counts
from bozzetto.errors import UsageError
from bozzetto.targets.llamagen import RMSNorm

TOKENS_ABOVE = (-1, 0, 1, 2)  # columns of the row above, relative to a place's own
FEATURES_ABOVE = (0, 1, 2)  # a feature knows the tokens before its own


@dataclass(frozen=True)
class GlanceConfig:
    """dim, vocab, grid: the target's; places: K; narrow: numbers that are kept of a token or a feature; ffn: hidden
    units; rank: of the table of the token before."""

    dim: Size
    vocab: Size
    grid: Grid
    places: Layers = 12
    narrow: Size = 128
    ffn: Size = 384
    rank: Size = 96

    def __post_init__(self) -> None:
        check_counts(self, "dim", "grid", "places", "narrow", "ffn", "rank")
        if self.places > self.grid:  # what is above the last place has to be known
            raise UsageError(f"places = {self.places} is not allowed: at most a row of the grid, {self.grid}")

    @property
    def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What a place looks at, tokens and features, as distances in raster order."""
        above = tuple(column - self.grid for column in TOKENS_ABOVE)
        return (*above, -2 * self.grid), tuple(column - self.grid for column in FEATURES_ABOVE)


class GlanceNet(nn.Module):
    """of_token, of_feature: what is kept of them; gain, shift: of the last feature at each place; column: of the
    grid."""

    def __init__(self, config: GlanceConfig):
        super().__init__()
        self.config = c = config
        looked = 1 + sum(map(len, c.around))
        self.of_token, self.of_feature = (nn.Linear(c.dim, c.narrow, bias=False) for _ in range(2))
        self.last = nn.Linear(c.dim, c.dim, bias=False)
        self.gain, self.shift = nn.Parameter(torch.ones(c.places, c.dim)), nn.Parameter(torch.zeros(c.places, c.dim))
        self.column = nn.Parameter(torch.zeros(c.grid, c.dim))
        self.around = nn.Linear(looked * c.narrow, c.dim, bias=False)
        self.norm = RMSNorm(c.dim, 1e-6)
        self.gate_up = nn.Linear(c.dim, 2 * c.ffn, bias=False)
        self.down = nn.Linear(c.ffn, c.dim, bias=False)
        self.before = nn.Embedding(c.vocab, c.rank)
        self.to_logits = nn.Linear(c.rank, c.vocab, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.eye_(self.last.weight)
        nn.init.zeros_(self.to_logits.weight)

    def places(self, feature: Tensor, last: Tensor, around: Tensor, number: Tensor) -> Tensor:
        """feature [..., 1, d], last [..., 1, narrow]: of the last committed pair; around [..., K, count narrow]: what
        is kept of the surroundings of each place, tokens, then features, zeros where nothing is known; number: int64
        [..., K], the places in raster order -> features [..., K, d]."""
        seen = torch.cat([last.expand(*around.shape[:-1], -1), around], -1)
        h = self.last(feature) * self.gain + self.shift + self.column[number % self.config.grid] + self.around(seen)
        gate, up = self.gate_up(self.norm(h)).chunk(2, -1)
        return h + self.down(F.silu(gate) * up)

    def after(self, features: Tensor, embedded: Tensor, anchors: Tensor) -> Tensor:
        """Over whole sequences: pairs [R, n, d], anchors int64 [R, A] -> [R, A, K, d], features of anchors + 1 .. + K
        (beyond the sequence: of nothing)."""
        number = anchors[..., None] + torch.arange(1, self.config.places + 1, device=anchors.device)  # [R, A, K]
        kept = self.of_token(embedded), self.of_feature(features)
        row = torch.arange(len(anchors), device=anchors.device)[:, None]
        looked = [
            surroundings(part, number, distances, anchors[..., None])
            for part, distances in zip(kept, self.config.around, strict=True)
        ]
        last, feature = (part[row, anchors][:, :, None] for part in (kept[0], features))
        return self.places(feature, last, torch.cat(looked, -1), number)

    def bias(self, tokens: Tensor) -> Tensor | None:
        """Logits [..., V] that follow tokens int64 [...]."""
        return self.to_logits(self.before(tokens))


def surroundings(kept: Tensor, number: Tensor, distances: tuple[int, ...], last: Tensor) -> Tensor:
    """kept [R, n, narrow], by raster order; number: int64 [R, ...], places; last: int64, the last known one, of a
    shape that goes with number -> [R, ..., len(distances) narrow], zeros where nothing is known."""
    where, known = known_around(number, distances, last)
    row = torch.arange(len(kept), device=kept.device).view(-1, *[1] * (where.dim() - 1))
    return torch.where(known, kept[row, where], 0).flatten(-2)


def known_around(number: Tensor, distances: tuple[int, ...], last: Tensor) -> tuple[Tensor, Tensor]:
    """Places int64 [..., n] at distances from number int64 [...] (0 for unknown ones), and which of them are known,
    bool [..., n, 1]. last: int64, the last known place, of a shape that goes with number."""
    where = number[..., None] + torch.tensor(distances, device=number.device)
    known = (where >= 0) & (where <= last[..., None])
    return torch.where(known, where, 0), known[..., None]
