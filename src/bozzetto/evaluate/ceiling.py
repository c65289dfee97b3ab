"""The ceiling of a Jacobi window: how much the law at a position changes when the drafts before it change.

A position's draft was drawn from its law under the last pass's context; any rule that keeps it must pay for
TV(new law, old law). 1 - TV is the largest probability of keeping it (the exact rule reaches it; seed-exact reaches at
least (1 - TV) / (1 + TV), DISD, arXiv 2408.07978).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bozzetto.drafters.base import Observation, Start
from bozzetto.drafters.jacobi import Jacobi
from bozzetto.drafts import Draft


class CeilingProbe(Jacobi):
    """A Jacobi drafter that records 1 - TV between successive laws by offset in the window; it changes no token."""

    def __init__(self, window: int, length: int):
        super().__init__(window)
        self.length = length
        self.total = torch.zeros(max(1, window - 1), dtype=torch.float64)
        self.count = torch.zeros(max(1, window - 1), dtype=torch.float64)

    def begin(self, start: Start) -> None:
        super().begin(replace(start, with_laws=True))

    def propose(self, batch: int, limit: int) -> Draft:
        self.proposed = super().propose(batch, limit)
        return self.proposed

    def observe(self, seen: Observation) -> None:
        law = self.proposed.log_q
        if law is not None and law.shape[1]:
            width = law.shape[1]
            overlap = torch.minimum(law.exp(), seen.laws[:, :width].exp()).sum(-1).double()  # [B, L]
            inside = seen.start[:, None] + torch.arange(width, device=overlap.device) < self.length
            self.total[:width] += (overlap * inside).sum(0).cpu()
            self.count[:width] += inside.sum(0).cpu()
        super().observe(seen)

    def by_offset(self) -> Tensor:
        """Mean 1 - TV at each offset in the window, float64 [L]; offset 0 is the position next to be committed."""
        return self.total / self.count.clamp_min(1)
