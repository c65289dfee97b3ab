"""What a drafter is, and what it sees of the decode loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from bozzetto.drafts import Draft, Verdict
from bozzetto.laws.noise import GumbelField


@dataclass
class Observation:
    """What one pass taught. log_p: float32 [B, W, V], the target's laws at positions start..start + W - 1;
    verdict: the rule's tokens there; committed: int64 [B], tokens appended to each image; longest: the largest of them,
    known to the host; start: int64 [B]."""

    log_p: Tensor
    verdict: Verdict
    committed: Tensor
    longest: int
    start: Tensor

    def keep(self, rows: Tensor) -> Observation:
        """The given batch rows int64 [B']."""
        verdict = Verdict(self.verdict.tokens[rows], self.verdict.accepted[rows])
        return Observation(self.log_p[rows], verdict, self.committed[rows], self.longest, self.start[rows])


class Drafter(Protocol):
    """begin, then propose / observe in turn. All tensors are batched over the images still being decoded."""

    name: str

    @property
    def max_draft(self) -> int:
        """The longest chain ever proposed."""
        ...

    def begin(self, batch: int, noise: GumbelField, with_laws: bool) -> None:
        """Start a batch; with_laws: the rule needs the laws of the drafts."""
        ...

    def propose(self, batch: int, limit: int) -> Draft:
        """A chain of at most `limit` drafts per image."""
        ...

    def observe(self, seen: Observation) -> None: ...

    def keep(self, rows: Tensor) -> None:
        """Drop finished images: keep the given batch rows int64 [B']."""
        ...
