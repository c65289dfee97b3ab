"""What a drafter is, and what it sees of the decode loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from bozzetto.drafts import Draft, Verdict
from bozzetto.laws.categorical import LawSettings
from bozzetto.laws.noise import GumbelField


@dataclass
class Start:
    """What a drafter is told when a batch begins. labels: int64 [B]; length: tokens of an image; settings: the law's;
    noise: the Gumbel field of the tokens; keys: int64 [B], the images' keys for the drafter's own draws.

    What the rule asks for: with_laws, drafts carry their laws; fixed_noise, drafts are drawn with `noise` (the rule
    compares tokens only, so that guesses should be the target's own); with_hidden, drafts carry hidden states.
    """

    labels: Tensor
    length: int
    settings: LawSettings
    noise: GumbelField
    keys: Tensor
    with_laws: bool = False
    fixed_noise: bool = False
    with_hidden: bool = False


@dataclass
class Observation:
    """What one pass taught. log_p: float32 [B, W, V], the target's laws at the scored places; verdict: the rule's
    tokens and path; committed: int64 [B], tokens appended to each image; longest: the largest of them, known to the
    host; start: int64 [B]; features: [R, P, d], P >= longest, the target's hidden states along the path (R rows as in
    Scores), or None."""

    log_p: Tensor
    verdict: Verdict
    committed: Tensor
    longest: int
    start: Tensor
    features: Tensor | None = None

    def keep(self, rows: Tensor) -> Observation:
        """The given batch rows int64 [B']."""
        verdict = Verdict(self.verdict.tokens[rows], self.verdict.accepted[rows])
        features = self.features
        if features is not None:
            features = features.unflatten(0, (-1, len(self.start)))[:, rows].flatten(0, 1)
        return Observation(self.log_p[rows], verdict, self.committed[rows], self.longest, self.start[rows], features)


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

    def propose(self, batch: int, limit: int) -> Draft:
        """Drafts for at most `limit` positions per image where they are a chain; a tree may reach further."""
        ...

    def observe(self, seen: Observation) -> None: ...

    def keep(self, rows: Tensor) -> None:
        """Drop finished images: keep the given batch rows int64 [B']."""
        ...
