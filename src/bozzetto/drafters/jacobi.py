"""Coupled Jacobi window: the target's own, one-pass-stale samples are the draft (no training, no second model).

One pass gives a law at every window position. The rule's tokens there (coupled to the previous ones by fixed Gumbel
noise or by the keep-or-residual test) are the next draft, and the laws they follow are the next draft laws, for kept
and redrawn tokens alike. Positions that enter the window are drawn from a copy of the last law of the window.
Speculative Jacobi decoding: arXiv 2410.01699; coupling: SCD, arXiv 2510.24211.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bozzetto.drafters.base import Observation, Start
from bozzetto.drafts import Draft
from bozzetto.laws.categorical import gumbel_argmax, gumbel_margin


def smallest(margins: Tensor) -> Tensor:
    """[B, n] -> [B]; inf where there are none."""
    return margins.amin(1) if margins.shape[1] else torch.full_like(margins.sum(1), torch.inf)


class Jacobi:
    """window: scored positions per pass W (1 is sequential decoding); W - 1 of them are drafted.

    widen: window for the number of images still in progress, where it may change with that (wider as images finish).
    """

    name = "jacobi"
    wants_features = False

    def __init__(self, window: int, widen: Callable[[int], int] | None = None):
        self.window, self.widen = window, widen

    @property
    def max_nodes(self) -> int:
        return (max(self.window, self.widen(1)) if self.widen else self.window) - 1

    @property
    def max_depth(self) -> int:
        return self.max_nodes

    def begin(self, start: Start) -> None:
        self.noise, self.with_laws, self.length = start.noise, start.with_laws, start.length
        self.seen: Observation | None = None

    def propose(self, batch: int, limit: int) -> Draft:
        seen, device = self.seen, self.noise.keys.device
        length = min(limit, (self.widen(batch) if self.widen else self.window) - 1)
        if seen is None or length < 1:  # nothing is known before the first pass: it runs without drafts
            return Draft(torch.empty(batch, 0, dtype=torch.int64, device=device))
        # Slot s of this window stood at column committed + s of the last one; columns past its end are new.
        column = seen.committed[:, None] + torch.arange(length, device=device)  # [B, L]
        tokens, laws, margin = self._window(seen, column)
        return Draft(tokens, laws, window=True, margin=margin)

    def _window(self, seen: Observation, column: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Tokens int64 [B, L] of the window's slots and, where the rule asks for them, their laws [B, L, V] and the
        margin [B] of those drawn here."""
        width, length = seen.laws.shape[1], column.shape[1]
        new = max(0, seen.longest + length - width)
        position = seen.start[:, None] + torch.arange(width, width + new, device=column.device)
        last, noise = seen.laws[:, -1:], self.noise.rows(position)
        tokens = torch.cat([seen.verdict.tokens, gumbel_argmax(last, noise)], 1).gather(1, column)
        if not self.with_laws:
            return tokens, None, None
        rows = torch.arange(len(column), device=column.device)[:, None]
        # The images of a batch reach differently far: what nobody reads, or lies behind the end, does not count.
        unread = (position >= self.length) | (torch.arange(new, device=column.device) > column[:, -1:] - width)
        margin = gumbel_margin(last, noise).masked_fill(unread, torch.inf)
        return tokens, seen.laws[rows, column.clamp_max(width - 1)], smallest(margin)

    def observe(self, seen: Observation) -> None:
        self.seen = seen

    def keep(self, rows: Tensor) -> None:
        if self.seen is not None:
            self.seen = self.seen.keep(rows)
