"""How a masked model uses a smaller one as its draft model."""

from __future__ import annotations

from dataclasses import dataclass

from bozzetto.errors import UsageError


@dataclass(frozen=True)
class DraftWindow:
    """draft_length: autoregressive steps that are drafted at a time; prefill: share of the steps that the target does
    alone at the beginning."""

    draft_length: int = 8
    prefill: float = 0.05

    def __post_init__(self) -> None:
        if self.draft_length < 1:
            raise UsageError(f"draft_length = {self.draft_length} is not allowed: a whole number >= 1")
        if not 0 <= self.prefill <= 1:
            raise UsageError(f"prefill = {self.prefill} is not allowed: a number from 0 to 1")
