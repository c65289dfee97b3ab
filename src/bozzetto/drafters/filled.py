"""A coupled Jacobi window whose new slots a trained drafter fills: coupling keeps what the target has already said, and
the drafter's law replaces the copy of the window's last law where nothing is known yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bozzetto.drafters.base import Observation, Start
from bozzetto.drafters.grow import Sketcher
from bozzetto.drafters.jacobi import Jacobi, smallest
from bozzetto.drafts import Layout
from bozzetto.laws.categorical import LawSettings, gumbel_argmax, gumbel_margin, law_of


class FilledJacobi(Jacobi):
    """sketcher: fills the slots that enter the window, each after the token drafted before it; fresh: drafts at the
    head of the window that it fills in every pass: right behind a reject the target's own are the most out of date."""

    def __init__(self, window: int, sketcher: Sketcher, fresh: int = 0, widen: Callable[[int], int] | None = None):
        super().__init__(window, widen)
        self.sketcher, self.fresh, self.wants_features = sketcher, fresh, sketcher.wants_features

    def begin(self, start: Start) -> None:
        super().begin(start)
        self.settings = start.settings
        self.sketcher.begin(start.labels, start.settings.guided, self.max_nodes + 1)

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self.sketcher.keep(rows)

    def _window(self, seen: Observation, column: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        width = seen.laws.shape[1]
        rows = torch.arange(len(column), device=column.device)[:, None]
        known = (column < width) & (torch.arange(column.shape[1], device=column.device) >= self.fresh)
        old = seen.verdict.tokens.gather(1, column.clamp_max(width - 1))
        noise = self.noise.rows(seen.start[:, None] + column)
        fill = self._at_once if hasattr(self.sketcher, "bases") else self._one_by_one
        tokens, laws, margins = fill(seen, old, known, noise)
        if not self.with_laws:
            return tokens, None, None
        kept = seen.laws[rows, column.clamp_max(width - 1)]
        settled = known | (seen.start[:, None] + column >= self.length)
        return tokens, torch.where(known[..., None], kept, laws), smallest(margins.masked_fill(settled, torch.inf))

    def _one_by_one(
        self, seen: Observation, old: Tensor, known: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens int64 [B, L], `old` where known bool [B, L], the sketcher's laws [B, L, V], each drawn after the token
        before it, and the margins [B, L]. noise: [B, L, V]."""
        tokens, laws, length = [], [], old.shape[1]
        logits, _ = self.sketcher.extend(seen)
        for slot in range(length):
            laws.append(law_of(logits, self.settings))  # [B, 1, V]
            drawn = gumbel_argmax(laws[-1], noise[:, slot : slot + 1])
            tokens.append(torch.where(known[:, slot : slot + 1], old[:, slot : slot + 1], drawn))
            if slot + 1 < length:
                at = torch.full((1, 1), slot, device=old.device)
                sees = torch.ones(1, 1, slot + 1, dtype=torch.bool, device=old.device)
                logits, _ = self.sketcher.grow(tokens[-1], at, slot, Layout(at, at, sees))
        law = torch.cat(laws, 1)
        return torch.cat(tokens, 1), law, gumbel_margin(law, noise)

    def _at_once(self, seen: Observation, old: Tensor, known: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same of a sketcher that knows all places at once: what it learns from the token before, it learns from a
        first guess at it, drawn with the same noise, unfiltered, and so mostly the same."""
        sketcher: Any = self.sketcher
        base = sketcher.bases(seen)
        place = torch.arange(old.shape[1], device=old.device).clamp_max(base.shape[1] - 1)  # behind the last: its law
        base = base[:, place]
        unfiltered = LawSettings(self.settings.guidance, self.settings.temperature or 1.0)
        first = law_of(base, unfiltered)
        guess = torch.where(known, old, gumbel_argmax(first, noise))
        last = seen.verdict.tokens.gather(1, seen.committed[:, None] - 1)
        laws = law_of(base + sketcher.after(torch.cat([last, guess[:, :-1]], 1)), self.settings)
        margins = torch.minimum(gumbel_margin(first, noise), gumbel_margin(laws, noise))
        return torch.where(known, old, gumbel_argmax(laws, noise)), laws, margins
