"""A toy target whose every conditional law can be listed: logits by (label, prefix) from a table.

It meets the same contract as the real targets, cache semantics included, and its joint law can be enumerated.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from bozzetto.drafts import CODES, Layout
from bozzetto.laws.categorical import LawSettings, law_of
from bozzetto.targets.base import Scores
from bozzetto.targets.layers import visible


class TabularTarget:
    """tables: float32 [labels + 1, prefixes, V]; the last label is the unconditional one. A prefix of length n with
    tokens x is row offset(n) + sum_i x_i V^(n - 1 - i)."""

    tokens = CODES
    own = False

    def __init__(self, vocab: int, length: int, labels: int = 2, spread: float = 1.5, seed: int = 0):
        self.vocab, self.length, self.labels = vocab, length, labels
        self.device = torch.device("cpu")
        self.offsets = torch.tensor([(vocab**n - 1) // (vocab - 1) for n in range(length + 1)])
        generator = torch.Generator().manual_seed(seed)
        self.tables = spread * torch.randn(labels + 1, int(self.offsets[-1]), vocab, generator=generator)

    def begin(self, labels: Tensor, guided: bool, max_width: int) -> TabularSession:
        return TabularSession(self, labels, guided, max_width)

    def logits(self, labels: Tensor, prefix: Tensor) -> Tensor:
        """Logits after prefix int64 [B, n] -> [B, V]."""
        n = prefix.shape[1]
        powers = self.vocab ** torch.arange(n - 1, -1, -1)
        return self.tables[labels, self.offsets[n] + (prefix * powers).sum(-1)]

    def joint(self, label: int, settings: LawSettings) -> Tensor:
        """Probability of every sequence, float64 [V^N] in lexicographic order."""
        rows = torch.tensor([label, self.labels]) if settings.guided else torch.tensor([label])
        out = torch.ones(1, dtype=torch.float64)
        for n in range(self.length):
            listed = list(itertools.product(range(self.vocab), repeat=n))
            prefixes = torch.tensor(listed, dtype=torch.int64).view(len(listed), n)
            logits = torch.cat([self.logits(row.expand(len(prefixes)), prefixes) for row in rows])
            law = law_of(logits[:, None], settings)[:, 0].double().exp()
            out = (out[:, None] * law).flatten()
        return out


class TabularSession:
    """A batch on the toy target: its cache is the list of inputs seen so far."""

    def __init__(self, target: TabularTarget, labels: Tensor, guided: bool, max_width: int):
        self.target, self.guided, self.labels = target, guided, labels
        # The slots are poisoned so that reading one that no pass has written shows up as an index error.
        self.cache = torch.full((len(labels), target.length + max_width), -(10**9))
        self.position = torch.zeros_like(self.cache)  # where the input in each slot stands

    def score(self, inputs: Tensor, start: Tensor, furthest: int | None = None, layout: Layout | None = None) -> Scores:
        offset = torch.arange(inputs.shape[1])
        slots = (start[:, None] + (offset if layout is None else layout.slot)).expand(inputs.shape)
        position = (start[:, None] + (offset if layout is None else layout.depth)).expand(inputs.shape)
        self.cache.scatter_(1, slots, inputs)
        self.position.scatter_(1, slots, position)
        seen = visible(torch.arange(self.cache.shape[1]), start, inputs.shape[1], layout)
        rows = [self.labels, torch.full_like(self.labels, self.target.labels)] if self.guided else [self.labels]
        logits = torch.cat([self._scored(labels, position, seen) for labels in rows])
        return Scores(logits, logits)

    def _scored(self, labels: Tensor, position: Tensor, seen: Tensor) -> Tensor:
        """Logits [B, W, V] of inputs at `position` [B, W] that see slots [B, W, S]; zeros past the image's end."""
        t = self.target
        out = torch.zeros(*position.shape, t.vocab)
        for n in range(t.length):
            batch, column = (position == n).nonzero(as_tuple=True)
            if len(batch):
                # The visible inputs in the order of their positions are the prefix; input 0 is the condition.
                where = torch.where(seen[batch, column], self.position[batch], 10**6)
                ordered = self.cache[batch].gather(1, where.argsort(dim=1, stable=True))
                out[batch, column] = t.logits(labels[batch], ordered[:, 1 : n + 1])
        return out

    def compact(self, path: Tensor, start: Tensor) -> None:
        to = start[:, None] + torch.arange(path.shape[1])
        for table in (self.cache, self.position):
            table.scatter_(1, to, table.gather(1, start[:, None] + path))
        self.position.scatter_(1, to, to)

    def keep(self, rows: Tensor) -> None:
        self.labels, self.cache, self.position = self.labels[rows], self.cache[rows], self.position[rows]
