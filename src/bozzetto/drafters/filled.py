"""A coupled Jacobi window whose new slots a trained drafter fills: coupling keeps what the target has already said, and
the drafter's law replaces the copy of the window's last law where nothing is known yet."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bozzetto.drafters.base import Observation, Start
from bozzetto.drafters.grow import Sketcher
from bozzetto.drafters.jacobi import Jacobi
from bozzetto.drafts import Layout
from bozzetto.laws.categorical import gumbel_argmax, law_of


class FilledJacobi(Jacobi):
    """sketcher: fills the slots that enter the window, each after the tokens drafted before it."""

    def __init__(self, window: int, sketcher: Sketcher, widen: Callable[[int], int] | None = None):
        super().__init__(window, widen)
        self.sketcher, self.wants_features = sketcher, sketcher.wants_features

    def begin(self, start: Start) -> None:
        super().begin(start)
        self.settings = start.settings
        self.sketcher.begin(start.labels, start.settings.guided, self.max_nodes + 1)

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self.sketcher.keep(rows)

    def _window(self, seen: Observation, column: Tensor) -> tuple[Tensor, Tensor | None]:
        width, (batch, length), device = seen.laws.shape[1], column.shape, column.device
        rows, known = torch.arange(batch, device=device)[:, None], column < width
        old = seen.verdict.tokens.gather(1, column.clamp_max(width - 1))
        noise = self.noise.rows(seen.start[:, None] + column)
        logits, _ = self.sketcher.extend(seen)
        tokens, laws = [], []
        for slot in range(length):
            law = law_of(logits, self.settings)  # [B, 1, V]
            drawn = gumbel_argmax(law, noise[:, slot : slot + 1])
            tokens.append(torch.where(known[:, slot : slot + 1], old[:, slot : slot + 1], drawn))
            laws.append(law)
            if slot + 1 < length:
                at = torch.full((1, 1), slot, device=device)
                sees = torch.ones(1, 1, slot + 1, dtype=torch.bool, device=device)
                logits, _ = self.sketcher.grow(tokens[-1], at, slot, Layout(at, at, sees))
        if not self.with_laws:
            return torch.cat(tokens, 1), None
        kept = seen.laws[rows, column.clamp_max(width - 1)]
        return torch.cat(tokens, 1), torch.where(known[..., None], kept, torch.cat(laws, 1))
