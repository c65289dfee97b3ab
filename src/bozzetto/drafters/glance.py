"""A draft model without attention, for cheap passes: the last feature and what lies around each place, no more.

Features of the next K places come from the target's feature f_a of the last committed pair (drafters/parallel.py), the
token x_a that followed it, and the committed tokens and features of the row above each place, all of them narrow; a
low-rank table tells each law which token was drawn just before (DSpark's). The row above says much of what attention
would find out (ZipAR, arXiv 2412.04062; Hawk, arXiv 2510.25739), and the laws of all places cost one small network and
one product with the head. It keeps two rows of narrow numbers, so that it can be a part of the step itself
(`GlanceFill`; its readable twin is `CachedGlance`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.common.checks import Grid, Layers, Size
from bozzetto.drafters.base import Observation, gather_rows
from bozzetto.drafters.parallel import CachedParallel, check_counts, gated
from bozzetto.errors import require
from bozzetto.runtime.engine import LinearMap
from bozzetto.runtime.head import GlanceLayers
from bozzetto.targets.layers import RMSNorm, small_maps

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
        # What is above the last place has to be known.
        require(self.places <= self.grid, "places", self.places, f"at most a row of the grid, {self.grid}")

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
        small_maps(self)
        nn.init.eye_(self.last.weight)
        nn.init.zeros_(self.to_logits.weight)

    def places(self, feature: Tensor, last: Tensor, around: Tensor, number: Tensor) -> Tensor:
        """feature [..., 1, d], last [..., 1, narrow]: of the last committed pair; around [..., K, count narrow]: what
        is kept of the surroundings of each place, tokens, then features, zeros where nothing is known; number: int64
        [..., K], the places in raster order -> features [..., K, d]."""
        seen = torch.cat([last.expand(*around.shape[:-1], -1), around], -1)
        h = self.last(feature) * self.gain + self.shift + self.column[number % self.config.grid] + self.around(seen)
        return gated(h, self.norm(h), self.gate_up, self.down)

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


class CachedGlance(CachedParallel):
    """held: what is kept of tokens and of features, narrow, one row for each committed pair."""

    axis, table = 1, True

    @torch.no_grad()
    def __init__(self, net: GlanceNet, embedding: Tensor, output: Any):
        super().__init__(net, embedding, output)
        self.narrow = self.net.of_token(embedding)  # [V, narrow]
        self.fill = GlanceFill(net, embedding, output) if self.own else None

    def begin(self, labels: Tensor, guided: bool, max_nodes: int) -> None:
        super().begin(labels, guided, max_nodes)
        # The same for our kernels, by image, and the committed tokens.
        self.kept = self.held.new_zeros(len(labels), self.copies, *self.held.shape[2:])
        self.codes = torch.zeros(self.kept.shape[::2][:2], dtype=torch.int64, device=self.device)

    def own_bases(self, seen: Observation) -> Tensor:
        assert self.fill is not None and seen.features is not None
        new = seen.start[:, None] + self.step[: seen.longest]
        self.codes.scatter_(1, new, seen.verdict.tokens[:, : seen.longest])
        given = seen.features[:, : seen.longest].to(self.dtype), self.kept, self.codes
        found: Tensor = self.fill(*given, seen.start, seen.committed, self.config.places)
        return found

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self.kept, self.codes = self.kept[rows], self.codes[rows]

    def join(self, other: Any) -> None:
        super().join(other)
        self.kept, self.codes = torch.cat([self.kept, other.kept]), torch.cat([self.codes, other.codes])

    def shape(self, length: int) -> tuple[int, ...]:
        return 2, self.rows, length, self.config.narrow

    def places(self, features: Tensor, tokens: Tensor, start: Tensor, at: Tensor) -> Tensor:
        c, new, last = self.config, start + self.step[: tokens.shape[1]], start + at
        self.held[0, self.row, new] = self.narrow[tokens]
        self.held[1, self.row, new] = self.net.of_feature(features)
        number = last + 1 + self.step[: c.places]
        looked = [surroundings(held, number, far, last) for held, far in zip(self.held, c.around, strict=True)]
        return self.net.places(gather_rows(features, at), self.held[0, self.row, last], torch.cat(looked, -1), number)


class GlanceFill(nn.Module):
    """A glance as a part of a step: from what a pass has just found to the laws of the next drafts. Nothing is held:
    what is kept of features is a tensor of the slots, what is kept of tokens a table of the codebook, so that all of it
    can be a part of it (decoding/advance.py).

    embedding: the target's rows [V, d], output: its read-out, in the dtype to compute in; fresh: drafts at the head of
    the window that are drawn anew in every pass."""

    @torch.no_grad()
    def __init__(self, net: GlanceNet, embedding: Tensor, output: Any, fresh: int = 0):
        super().__init__()
        self.config, self.fresh, dtype = net.config, fresh, output.dtype

        def linear(weight: Tensor, gated: bool = False) -> Any:
            return type(output)(weight, None, dtype, gated)

        def fixed(weight: Tensor) -> nn.Parameter:
            return nn.Parameter(weight.detach().to(dtype).contiguous(), requires_grad=False)

        self.of_token = fixed(F.linear(embedding, net.of_token.weight.to(dtype)))  # [V, narrow]
        self.of_feature, self.last, self.around = map(
            linear, (w.weight for w in (net.of_feature, net.last, net.around))
        )
        self.gate_up, self.down = linear(net.gate_up.weight, gated=True), linear(net.down.weight)
        self.output, self.to_logits = output, linear(net.to_logits.weight)
        self.gain, self.shift, self.column, self.norm = map(fixed, (net.gain, net.shift, net.column, net.norm.weight))
        self.before = fixed(net.before.weight)
        self.layers = None
        if isinstance(output, LinearMap):
            maps = self.of_feature, self.last, self.around, self.gate_up, self.down
            tables = self.gain, self.shift, self.column, self.norm
            self.layers = GlanceLayers(net.config.grid, net.config.around, maps, self.of_token.detach(), tables)

    def extra_repr(self) -> str:
        return f"{self.config}, fresh={self.fresh}"

    @property
    def narrow(self) -> int:
        """Numbers that are kept of a feature."""
        return self.config.narrow

    def forward(
        self, hidden: Tensor, kept: Tensor, tokens: Tensor, count: Tensor, committed: Tensor, most: int
    ) -> Tensor:
        """hidden [R, W, d] of a pass from token `count` int64 [B] on, R = copies B; kept [B, copies, S, narrow] is
        changed in place; tokens: int64 [B, S], what is committed, `committed` int64 [B] by this pass; most: drafts
        wanted -> logits float32 [R, min(most, K), V] of the tokens behind, without what the table adds."""
        if self.layers is not None:
            wanted = min(most, self.config.places)
            return self.output.exact(self.layers(hidden, kept, tokens, count, committed, wanted))
        c, (batch, copies, *_), width = self.config, kept.shape, hidden.shape[1]
        row, copy = (torch.arange(n, device=hidden.device) for n in (batch, copies))
        new = count[:, None] + torch.arange(width, device=hidden.device)
        by_image = self.of_feature(hidden).unflatten(0, (copies, -1)).transpose(0, 1)  # [B, copies, W, narrow]
        kept[row[:, None, None], copy[:, None], new[:, None]] = by_image
        last = (count + committed - 1).clamp_min(0)[:, None]  # [B, 1]; a slot without an image commits nothing
        number = last + 1 + torch.arange(min(most, c.places), device=hidden.device)  # [B, K]
        far_tokens, far_features = c.around
        where, known = known_around(number, far_tokens, last)
        around = torch.where(known, self.of_token[tokens[row[:, None, None], where]], 0).flatten(2)
        ends = self.of_token[tokens.gather(1, last)].expand(-1, number.shape[1], -1)
        where, known = known_around(number, far_features, last)
        of_features = kept[row[:, None, None, None], copy[:, None, None], where[:, None]]
        of_features = torch.where(known[:, None], of_features, 0).flatten(3)  # [B, copies, K, .]
        ours = torch.cat([ends, around], -1).repeat(copies, 1, 1)
        seen = torch.cat([ours, of_features.transpose(0, 1).flatten(0, 1)], -1)
        at = (committed - 1).clamp_min(0).repeat(copies)[:, None, None].expand(-1, -1, c.dim)
        places = number.shape[1]
        column = self.column[number % c.grid].repeat(copies, 1, 1)
        h = self.last(hidden.gather(1, at)) * self.gain[:places] + self.shift[:places] + column + self.around(seen)
        h = h + self.down(self.gate_up(F.rms_norm(h, (c.dim,), self.norm, 1e-6)))
        return self.output.exact(h)

    def bias(self, tokens: Tensor) -> Tensor:
        """What the table adds to logits behind tokens int64 [B, n]: float32 [B, n, V]."""
        return self.to_logits.exact(self.before[tokens])
