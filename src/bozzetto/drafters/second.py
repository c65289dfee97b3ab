"""A coupled Jacobi window with second guesses: beside the tokens that the target drew a pass ago, which an earlier
reject may have made stale, stand tokens that a trained drafter draws after what is committed now.

Every pass ends at a reject, and there the second guess may be right; then one more token is known behind it. Windows
and drafters fail in different places, so that the two gains add up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bozzetto.drafters.base import Observation, Start
from bozzetto.drafters.grow import Sketcher
from bozzetto.drafters.jacobi import Jacobi
from bozzetto.drafts import Draft, Layout
from bozzetto.drafts.tree import comb_tree
from bozzetto.laws.categorical import gumbel_argmax, law_of
from bozzetto.laws.noise import fold, gumbel


class SecondGuess(Jacobi):
    """sketcher: guesses the tokens beside; places: how many of the window's first places have one."""

    def __init__(self, window: int, sketcher: Sketcher, places: int, widen: Callable[[int], int] | None = None):
        super().__init__(window, widen)
        self.sketcher, self.places, self.wants_features = sketcher, places, sketcher.wants_features

    @property
    def max_nodes(self) -> int:
        return super().max_nodes + self.places

    @property
    def max_depth(self) -> int:
        return super().max_nodes

    def begin(self, start: Start) -> None:
        super().begin(start)
        self.settings, self.keys, self.passes, self.fixed = start.settings, start.keys, 0, start.fixed_noise
        self.sketcher.begin(start.labels, start.settings.guided, self.places + 1)

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self.keys = self.keys[rows]
        self.sketcher.keep(rows)

    def observe(self, seen: Observation) -> None:
        """What the window goes on from are the places of its chain."""
        super().observe(replace(seen, log_p=seen.laws[:, : seen.verdict.tokens.shape[1]]))

    def propose(self, batch: int, limit: int) -> Draft:
        self.passes += 1
        draft = super().propose(batch, limit)
        if self.seen is None or not draft.length:
            return draft
        count = min(self.places, draft.length)
        tokens, laws = self._beside(self.seen, draft.tokens[:, :count])
        log_q = None if draft.log_q is None else torch.cat([draft.log_q, laws], 1)
        comb = comb_tree(draft.length, count, tokens.device)
        return Draft(torch.cat([draft.tokens, tokens], 1), log_q, comb, window=True, beside=count)

    def _beside(self, seen: Observation, chain: Tensor) -> tuple[Tensor, Tensor]:
        """Second guesses int64 [B, n] beside the window's tokens int64 [B, n], and the laws [B, n, V] they follow."""
        place, laws = torch.arange(chain.shape[1], device=chain.device), []
        logits, _ = self.sketcher.extend(seen)
        for slot in range(chain.shape[1]):
            laws.append(law_of(logits, self.settings))
            if slot + 1 < chain.shape[1]:
                at = place[None, slot : slot + 1]
                sees = torch.ones(1, 1, slot + 1, dtype=torch.bool, device=chain.device)
                logits, _ = self.sketcher.grow(chain[:, slot : slot + 1], at, slot, Layout(at, at, sees))
        whole = torch.cat(laws, 1)
        if self.fixed:
            noise = self.noise.rows((seen.start + seen.committed)[:, None] + place)
        else:
            keys = fold(fold(self.keys, self.passes)[:, None], place)
            noise = gumbel(fold(keys[..., None], torch.arange(whole.shape[-1], device=chain.device)))
        return gumbel_argmax(whole, noise), whole
