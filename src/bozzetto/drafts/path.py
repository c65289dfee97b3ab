"""Drafts of continuous tokens: chains over positions, each token with the denoising path it came from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bozzetto.laws.chain import ChainLaw, Path


@dataclass
class PathDraft:
    """tokens: float32 [B, M, D], drafted tokens of the M positions after the committed ones (M may be 0).

    path: their denoising paths, [B, M, ...], with the draft's laws of every step, where the rule asks for them; law:
    the draft's laws at its B M places, to score other paths with.
    """

    tokens: Tensor
    path: Path | None = None
    law: ChainLaw | None = None
    tree = None  # always a chain over positions

    @property
    def length(self) -> int:
        """Drafted tokens, M."""
        return self.tokens.shape[1]

    @property
    def depth(self) -> int:
        """Most drafts that one pass can accept."""
        return self.length


@dataclass
class PathVerdict:
    """tokens: float32 [B, M + 1, D]: the first `accepted` are drafts, the next one is the rule's own; what follows is a
    suggestion for later drafts (rules with `window`), else it means nothing. accepted: int64 [B].

    path: [B, M + 1, ...], the target's own paths at every place, from rules with `window`; distance: float32 [B, M +
    1], how far each token is from the target's own sample with the same noise, from rules that measure it.
    """

    tokens: Tensor
    accepted: Tensor
    path: Path | None = None
    distance: Tensor | None = None
    along = None  # places are in order
    spent = None

    def keep(self, rows: Tensor) -> PathVerdict:
        """The given batch rows int64 [B']."""
        path = None if self.path is None else Path(*(part[rows] for part in self.path))
        distance = None if self.distance is None else self.distance[rows]
        return PathVerdict(self.tokens[rows], self.accepted[rows], path, distance)
