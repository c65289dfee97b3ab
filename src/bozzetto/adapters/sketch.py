"""A trained EAGLE layer as drafter of a prompted target: the target's own rows embed, its own head reads."""

from __future__ import annotations

import torch
from torch import Tensor

from bozzetto.adapters.prompted import PromptedCodes
from bozzetto.drafters.base import Observation
from bozzetto.drafts import Layout
from bozzetto.models.eagle import EagleConfig, EagleNet
from bozzetto.models.sketch import EagleLayerCache


def prompted_eagle(target: PromptedCodes, heads: int, ffn: int) -> EagleConfig:
    """The shape of a drafter for the target. heads, ffn: of its one layer."""
    shape = target.config
    return EagleConfig(shape.dim, heads, ffn, shape.vocab, shape.grid)


class PromptedEagle(EagleLayerCache):
    """Pairs of a target feature and a token in, the next law out. The number of the token that a law is of is told to
    the target, which knows what stands where (ends of lines)."""

    @torch.no_grad()
    def __init__(self, net: EagleNet, target: PromptedCodes):
        super().__init__(net, target.dtype)
        self.target = target

    def embed(self, tokens: Tensor) -> Tensor:
        return self.target.embedding[tokens]

    def extend(self, seen: Observation) -> tuple[Tensor, Tensor]:
        hidden = self.take_in(seen)
        return self._law(hidden, self.next[:, None]), hidden

    def grow(self, tokens: Tensor, parent: Tensor, first: int, layout: Layout) -> tuple[Tensor, Tensor]:
        hidden = self.put_out(tokens, parent, layout)
        return self._law(hidden, self.next[:, None] + layout.depth + 1), hidden

    def _law(self, hidden: Tensor, number: Tensor) -> Tensor:
        """float32 [R, n, V] of tokens `number` int64 [B, n]."""
        return self.target.logits(hidden, number.repeat(self.copies, 1))
