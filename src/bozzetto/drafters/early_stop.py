"""How far it is worth drafting: by how flat the drafter's laws are and how often such drafts of this image were kept.

A draft's chance to be reached is the product, along the way to it, of the share of drafts that were kept where the
drafter's law was as flat as there. Below a node whose chance is less than `stop` nothing is drafted. The decision
depends on the image's own past and on the nodes above only, so that exact rules stay exact and an image does not depend
on its batch. Drift-AR stops by entropy alone; here bins of it learn what an entropy means.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bozzetto.drafts import Verdict

_BINS = 8  # of the entropy, from 0 to that of a uniform law
_PRIOR = 4.0  # drafts that the first guess counts for
_MEMORY = 0.98  # per pass


def flatness_of(log_q: Tensor) -> Tensor:
    """Entropy over that of a uniform law: log-laws [..., V] -> [...] in [0, 1]."""
    return -(log_q.exp() * log_q.clamp_min(-1e4)).sum(-1) / math.log(log_q.shape[-1])


class EarlyStop:
    """One image per row. stop: the least chance of a node to be reached with which something is drafted below it."""

    def __init__(self, batch: int, stop: float, device: torch.device):
        self.stop = stop
        first = 1 - (torch.arange(_BINS, device=device) + 0.5) / _BINS  # sharp laws are guessed well
        self.tried = torch.full((batch, _BINS), _PRIOR, device=device)
        self.kept = self.tried * first

    def begin(self, nodes: int) -> None:
        """A new draft of at most so many nodes."""
        batch, device = len(self.tried), self.tried.device
        self.present = torch.zeros(batch, nodes + 1, dtype=torch.bool, device=device)
        self.present[:, 0] = True
        self.open = self.present.clone()  # nodes below which drafting may go on
        self.mother = torch.zeros_like(self.open)  # nodes below which something was drafted
        self.chance = torch.ones(batch, nodes + 1, device=device)
        self.bin = torch.zeros(batch, nodes + 1, dtype=torch.int64, device=device)  # of the law below each node

    def go_on(self, mothers: Tensor, kids: Tensor, flatness: Tensor) -> bool:
        """Whether any image drafts on after a level. mothers: int64 [I], nodes; kids: int64 [I, C], their children (0:
        none); flatness: [B, I], from 0 to 1, of what these were drawn from."""
        flat = (flatness * _BINS).long().clamp(0, _BINS - 1)
        self.bin[:, mothers], self.mother[:, mothers] = flat, self.open[:, mothers]
        share = (self.kept / self.tried).gather(1, flat)
        real = kids > 0
        number = kids[real]
        of = torch.arange(len(mothers), device=kids.device)[:, None].expand_as(kids)[real]
        self.chance[:, number] = (self.chance[:, mothers] * share)[:, of]
        self.present[:, number] = self.open[:, mothers][:, of]
        self.open[:, number] = self.present[:, number] & (self.chance[:, number] >= self.stop)
        return bool(self.open[:, number].any())

    def observe(self, verdict: Verdict) -> None:
        """Learn from a verdict: what was drafted below the nodes of the accepted path was kept, except the last."""
        accepted = verdict.accepted[:, None]
        depth = torch.arange(self.bin.shape[1], device=accepted.device)
        node = depth.expand(len(self.tried), -1) if verdict.path is None else verdict.path
        depth = depth[: node.shape[1]]
        tried = self.mother.gather(1, node) & (depth <= accepted)
        flat = self.bin.gather(1, node)
        self.tried = (self.tried * _MEMORY).scatter_add(1, flat, tried.float())
        self.kept = (self.kept * _MEMORY).scatter_add(1, flat, (tried & (depth < accepted)).float())

    def keep(self, rows: Tensor) -> None:
        """Drop images: keep the given batch rows int64 [B']."""
        for name, part in vars(self).items():
            if isinstance(part, Tensor):
                setattr(self, name, part[rows])

    def join(self, other: EarlyStop) -> None:
        """Have other images behind these, before the next draft."""
        self.tried, self.kept = torch.cat([self.tried, other.tried]), torch.cat([self.kept, other.kept])
