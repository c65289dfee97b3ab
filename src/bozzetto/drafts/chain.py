"""A chain of drafted tokens per image, and the verdict on it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Draft:
    """tokens: int64 [B, L], drafted for the L positions after the committed ones (L may be 0).

    log_q: float32 [B, L, V], the log-law each token was drawn from (after guidance, temperature, top-k, top-p), or None
    when the drafter keeps none (enough for rules that need no draft law).
    """

    tokens: Tensor
    log_q: Tensor | None = None

    @property
    def length(self) -> int:
        return self.tokens.shape[1]


@dataclass
class Verdict:
    """tokens: int64 [B, L + 1], the rule's token at every scored position; the first `accepted` equal the draft, the
    next one is the rule's own, what follows is only a suggestion for later drafts. accepted: int64 [B]."""

    tokens: Tensor
    accepted: Tensor
