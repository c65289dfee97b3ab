"""Coupled Jacobi window: the target's own, one-pass-stale samples are the draft (no training, no second model).

One pass gives a law at every window position. The rule's tokens there (coupled to the previous ones by fixed Gumbel
noise or by the keep-or-residual test) are the next draft, and the laws they follow are the next draft laws, for kept
and redrawn tokens alike. Positions that enter the window are drawn from a copy of the last law of the window.
Speculative Jacobi decoding: arXiv 2410.01699; coupling: SCD, arXiv 2510.24211.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bozzetto.drafters.base import Observation
from bozzetto.drafts import Draft
from bozzetto.laws.categorical import gumbel_argmax
from bozzetto.laws.noise import GumbelField


class Jacobi:
    """window: scored positions per pass W (1 is sequential decoding); W - 1 of them are drafted."""

    name = "jacobi"

    def __init__(self, window: int):
        self.window = window

    @property
    def max_draft(self) -> int:
        return self.window - 1

    def begin(self, batch: int, noise: GumbelField, with_laws: bool) -> None:
        self.noise, self.with_laws = noise, with_laws
        # Nothing is known before the first pass: it runs without drafts.
        self.draft = Draft(torch.empty(batch, 0, dtype=torch.int64, device=noise.keys.device))

    def propose(self, batch: int, limit: int) -> Draft:
        d = self.draft
        return Draft(d.tokens[:, :limit], None if d.log_q is None else d.log_q[:, :limit])

    def observe(self, seen: Observation) -> None:
        if self.window == 1:
            return
        device, width = seen.log_p.device, seen.log_p.shape[1]
        # Slot s of the next window stood at column committed + s of this one; columns past the end are new.
        column = seen.committed[:, None] + torch.arange(self.window - 1, device=device)  # [B, L]
        new = max(0, seen.longest + self.window - 1 - width)
        position = seen.start[:, None] + torch.arange(width, width + new, device=device)
        entering = gumbel_argmax(seen.log_p[:, -1:], self.noise.rows(position))
        tokens = torch.cat([seen.verdict.tokens, entering], 1).gather(1, column)
        laws = None
        if self.with_laws:
            laws = seen.log_p[torch.arange(len(column), device=device)[:, None], column.clamp_max(width - 1)]
        self.draft = Draft(tokens, laws)

    def keep(self, rows: Tensor) -> None:
        d = self.draft
        self.draft = Draft(d.tokens[rows], None if d.log_q is None else d.log_q[rows])
