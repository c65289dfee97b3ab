"""How a masked model uses a smaller one as its draft model."""

from __future__ import annotations

from dataclasses import dataclass

from bozzetto.errors import require


@dataclass(frozen=True)
class DraftWindow:
    """draft_length: autoregressive steps that are drafted at a time; prefill: share of the steps that the target does
    alone at the beginning."""

    draft_length: int = 8
    prefill: float = 0.05

    def __post_init__(self) -> None:
        require(self.draft_length >= 1, "draft_length", self.draft_length, "a whole number >= 1")
        require(0 <= self.prefill <= 1, "prefill", self.prefill, "a number from 0 to 1")
