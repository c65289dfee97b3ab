"""What a drafter is, and what it sees of the decode loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from bozzetto.drafts import Draft, PathDraft, PathVerdict, Verdict
from bozzetto.laws.categorical import LawSettings
from bozzetto.laws.noise import NoiseField


@dataclass
class Start:
    """What a drafter is told when a batch begins. labels: int64 [B]; length: tokens of an image; settings: the law's;
    noise: the fixed noise of the tokens; keys: int64 [B], the images' keys for the drafter's own draws.

    What the rule asks for: with_laws, drafts carry their laws; fixed_noise, drafts are drawn with `noise` (the rule
    compares tokens only, so that guesses should be the target's own); with_hidden, drafts carry hidden states.
    """

    labels: Tensor
    length: int
    settings: LawSettings
    noise: NoiseField
    keys: Tensor
    with_laws: bool = False
    fixed_noise: bool = False
    with_hidden: bool = False


@dataclass
class Observation:
    """What one pass taught. log_p: float32 [B, W, V], the target's laws at the scored places (None for continuous
    tokens, whose rules leave the target's paths in the verdict); verdict: the rule's tokens and path; committed: int64
    [B], tokens appended to each image; longest: the largest of them, known to the host; start: int64 [B]; features: [R,
    P, d], P >= longest, the target's hidden states along the path (R rows as in Scores), or None.
    """

    log_p: Tensor | None
    verdict: Verdict | PathVerdict
    committed: Tensor
    longest: int
    start: Tensor
    features: Tensor | None = None

    def keep(self, rows: Tensor) -> Observation:
        """The given batch rows int64 [B']."""
        features = self.features
        if features is not None:
            features = features.unflatten(0, (-1, len(self.start)))[:, rows].flatten(0, 1)
        log_p = None if self.log_p is None else self.log_p[rows]
        verdict, start = self.verdict.keep(rows), self.start[rows]
        return Observation(log_p, verdict, self.committed[rows], self.longest, start, features)

    @property
    def laws(self) -> Tensor:
        """log_p, which is there for codes."""
        if self.log_p is None:
            raise ValueError("continuous tokens leave no log-laws")
        return self.log_p


class Drafter(Protocol):
    """begin, then propose / observe in turn. All tensors are batched over the images still being decoded."""

    name: str

    @property
    def max_nodes(self) -> int:
        """The most nodes ever drafted in a pass."""
        ...

    @property
    def max_depth(self) -> int:
        """The most positions ever drafted in a pass."""
        ...

    @property
    def wants_features(self) -> bool:
        """Whether observations must hold the target's hidden states."""
        ...

    def begin(self, start: Start) -> None: ...

    def propose(self, batch: int, limit: int) -> Draft | PathDraft:
        """Drafts for at most `limit` positions per image where they are a chain; a tree may reach further."""
        ...

    def observe(self, seen: Observation) -> None: ...

    def keep(self, rows: Tensor) -> None:
        """Drop finished images: keep the given batch rows int64 [B']."""
        ...
