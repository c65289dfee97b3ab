"""A trained EAGLE layer as drafter of a prompted target: the target's own rows embed, its own head reads."""

from __future__ import annotations

import torch
from torch import Tensor

from bozzetto.adapters.prompted import PromptedCodes, PromptedSession
from bozzetto.drafters.base import DraftModel, Observation, gather_rows
from bozzetto.drafters.eagle import EagleLayerCache, EagleNet, Lead
from bozzetto.drafts import Layout


class PromptedEagle(EagleLayerCache, DraftModel):
    """Pairs of a target feature and a token in, the next law out. The number of the token that a law is of is told to
    the target, which knows what stands where (ends of lines)."""

    @torch.no_grad()
    def __init__(self, net: EagleNet, target: PromptedCodes):
        super().__init__(net, target.dtype, target.own)
        self.target = target

    def embed(self, tokens: Tensor) -> Tensor:
        return self.target.embedding[tokens]

    def before(self, labels: Tensor, guided: bool) -> Lead | None:
        """The pairs of the prompts' own words: the hidden state at each but the last, with the word that follows."""
        if self.config.before != "words":
            return None
        t, prompts = self.target, self.target.conditions_of(labels, guided)
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=t.device)
        session = PromptedSession(t, prompts, 1, 0)
        states = session.fill()
        if states is None:
            states = t.words(ids[:, :0])
        at = torch.arange(longest - 1, device=t.device) - (longest - 1 - session.lead)[:, None]
        return t.words(ids).to(t.dtype)[:, 1:], gather_rows(states, at.clamp_min(0)), session.lead

    def extend(self, seen: Observation) -> tuple[Tensor, Tensor]:
        hidden = self.take_in(seen)
        return self._law(hidden, self.next[:, None]), hidden

    def grow(self, tokens: Tensor, parent: Tensor, first: int, layout: Layout) -> tuple[Tensor, Tensor]:
        hidden = self.put_out(tokens, parent, layout)
        return self._law(hidden, self.next[:, None] + layout.depth + 1), hidden

    def _law(self, hidden: Tensor, number: Tensor) -> Tensor:
        """float32 [R, n, V] of tokens `number` int64 [B, n]."""
        return self.target.logits(hidden, number.repeat(self.copies, 1))
