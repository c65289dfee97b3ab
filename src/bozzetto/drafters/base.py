"""What a drafter is, and what it sees of the decode loop."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bozzetto.drafters.early_stop import EarlyStop
from bozzetto.drafts import Draft, Layout, Verdict
from bozzetto.drafts.draft import joined
from bozzetto.laws.categorical import LawSettings, law_of
from bozzetto.laws.noise import NoiseField
from bozzetto.runtime.laws import own_law_of


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
    """What one pass taught. log_p: float32 [B, W, V], the target's laws at the scored places (None for vectors,
    whose rules leave the target's trajectories in the verdict); verdict: the rule's tokens and path; committed: int64
    [B], tokens appended to each image; longest: the largest of them, known to the host; start: int64 [B]; features: [R,
    P, d], P >= longest, the target's hidden states along the path (R rows as in Scores), or None.

    Where images joined since: width: int64 [B], places that were scored of each (None: all); narrowest: the least.
    """

    log_p: Tensor | None
    verdict: Verdict
    committed: Tensor
    longest: int
    start: Tensor
    features: Tensor | None = None
    width: Tensor | None = None
    narrowest: int = 0

    def widths(self) -> tuple[Tensor, int]:
        """width, of all int64 [B, 1], and the least."""
        if self.width is not None:
            return self.width[:, None], self.narrowest
        most = self.verdict.tokens.shape[1]
        return torch.full_like(self.start, most)[:, None], most

    def join(self, other: Observation) -> Observation:
        """With another batch's images behind."""
        log_p = features = None
        if self.log_p is not None and other.log_p is not None:
            log_p = joined(self.log_p, other.log_p)
        if self.features is not None and other.features is not None:
            mine, theirs = (seen.features.unflatten(0, (-1, len(seen.start))) for seen in (self, other))  # type: ignore[union-attr]
            features = torch.cat([joined(*pair) for pair in zip(mine, theirs, strict=True)])
        (width, least), (more, less) = self.widths(), other.widths()
        committed, start = (torch.cat([getattr(seen, n) for seen in (self, other)]) for n in ("committed", "start"))
        longest, verdict = max(self.longest, other.longest), self.verdict.join(other.verdict)
        width = torch.cat([width, more])[:, 0]
        return Observation(log_p, verdict, committed, longest, start, features, width, min(least, less))

    def keep(self, rows: Tensor) -> Observation:
        """The given batch rows int64 [B']."""
        features = self.features
        if features is not None:
            features = features.unflatten(0, (-1, len(self.start)))[:, rows].flatten(0, 1)
        log_p = None if self.log_p is None else self.log_p[rows]
        verdict, start = self.verdict.keep(rows), self.start[rows]
        width = None if self.width is None else self.width[rows]
        return Observation(log_p, verdict, self.committed[rows], self.longest, start, features, width, self.narrowest)

    @property
    def laws(self) -> Tensor:
        """log_p, which is there for codes."""
        if self.log_p is None:
            raise ValueError("continuous tokens leave no log-laws")
        return self.log_p


class Drafter:
    """begin, then propose / observe in turn. All tensors are batched over the images still being decoded. This one
    proposes nothing, ever: plain sequential decoding as a case of the same loop.

    model: the draft model that is asked, if any; dim: numbers of a token (None: codes); stop: where drafts end early
    (drafters/early_stop.py; 0: nowhere); draws_fixed: whether drafts are drawn with the fixed noise, whatever the rule
    asks for. What is held between passes: `start`; `keys` int64 [B], of the images; `passes` int64 [B]; `seen`, what
    the last pass taught (None: there was none); `early`.
    """

    name = "none"
    model: Any = None
    dim: int | None = None
    stop = 0.0
    draws_fixed = False

    def __init__(self, dim: int | None = None):
        self.dim = dim

    @property
    def max_nodes(self) -> int:
        """The most nodes ever drafted in a pass."""
        return 0

    @property
    def max_depth(self) -> int:
        """The most positions ever drafted in a pass."""
        return self.max_nodes

    @property
    def grown(self) -> int:
        """The most nodes that the draft model is asked about in a pass."""
        return self.max_nodes

    @property
    def wants_features(self) -> bool:
        """Whether observations must hold the target's hidden states."""
        return self.model is not None and self.model.wants_features

    def begin(self, start: Start) -> None:
        self.start, self.keys, self.passes = start, start.keys, torch.zeros_like(start.keys)
        self.seen: Observation | None = None
        self.early = EarlyStop(len(start.keys), self.stop, start.keys.device) if self.stop else None
        if self.model is not None:
            self.model.begin(start.labels, start.settings.guided, self.grown)

    def propose(self, batch: int, limit: int) -> Draft:
        """Drafts for at most `limit` positions per image where they are a chain; a tree may reach further."""
        return self.nothing(batch)

    def nothing(self, batch: int) -> Draft:
        """No drafts."""
        if self.dim is None:
            return Draft(torch.empty(batch, 0, dtype=torch.int64, device=self.keys.device))
        return Draft(torch.empty(batch, 0, self.dim, device=self.keys.device))

    def observe(self, seen: Observation) -> None:
        if self.early is not None:
            self.early.observe(seen.verdict)
        self.seen = seen

    def keep(self, rows: Tensor) -> None:
        """Drop finished images: keep the given batch rows int64 [B']."""
        self.keys, self.passes = self.keys[rows], self.passes[rows]
        self.seen = None if self.seen is None else self.seen.keep(rows)
        for part in (self.model, self.early):
            if part is not None:
                part.keep(rows)

    def another(self) -> Any:
        """The same for other images: weights are shared."""
        other = copy.copy(self)
        other.model = copy.copy(self.model)
        return other

    def join(self, other: Any) -> None:
        """Have the images of `another` behind these, after a pass of both."""
        self.keys, self.passes = torch.cat([self.keys, other.keys]), torch.cat([self.passes, other.passes])
        assert self.seen is not None and other.seen is not None
        self.seen = self.seen.join(other.seen)
        for part, more in ((self.model, other.model), (self.early, other.early)):
            if part is not None:
                part.join(more)


class DraftModel:
    """A cheap causal model with its own cache. All log-laws are made from logits [B, n, V] or [2B, n, V] (guided).

    wants_features: whether it learns from the target's hidden states; at_once: whether one call gives the logits of all
    next places, by `bases` and `after`; own: whether our kernels run it."""

    wants_features: bool = False
    at_once: bool = False
    own: bool = False

    def law(self, logits: Tensor, settings: LawSettings) -> Tensor:
        """`law_of`."""
        return (own_law_of if self.own else law_of)(logits, settings)

    def begin(self, labels: Tensor, guided: bool, max_nodes: int) -> None:
        """Start a batch: labels int64 [B]; max_nodes: most nodes ever grown in a pass."""
        raise NotImplementedError

    def extend(self, seen: Observation) -> tuple[Tensor, Tensor]:
        """Take in what a pass committed. Returns logits and hidden states (each [R, 1, ...]) for the next token."""
        raise NotImplementedError

    def grow(self, tokens: Tensor, parent: Tensor, first: int, layout: Layout) -> tuple[Tensor, Tensor]:
        """One level. tokens int64 [B, n]; parent int64 [b, n], numbers of their parents among the grown (0: the root,
        e: the e-th grown node); first: number of nodes grown before; layout: slots after the committed ones. Returns
        logits [R, n, V] and hidden states [R, n, d] that predict the nodes' children."""
        raise NotImplementedError

    def keep(self, rows: Tensor) -> None:
        """Drop finished images: keep the given batch rows int64 [B']."""
        raise NotImplementedError

    def join(self, other: Any) -> None:
        """Have the images of a copy behind these."""
        raise NotImplementedError

    def whole(self, seen: Observation) -> dict[str, Any] | None:
        """Fields of what our kernels need to draft whole trees after a pass (drafters/own.py); None where they do
        not."""
        return None

    def bases(self, seen: Observation) -> Tensor:
        """Take in what a pass committed -> logits float32 [R, K, V] of the next places, without what `after` adds."""
        raise NotImplementedError

    def after(self, tokens: Tensor) -> Tensor | float:
        """What the tokens before, int64 [B, n], add to logits [R, n, V]."""
        raise NotImplementedError


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """values [R, W, d] at columns int64 [B, n], R a multiple of B -> [R, n, d]."""
    index = index.repeat(len(values) // len(index), 1)
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
