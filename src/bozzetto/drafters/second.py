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
from bozzetto.laws.categorical import gumbel_argmax, gumbel_margin, law_of
from bozzetto.laws.noise import fold, gumbel


class SecondGuess(Jacobi):
    """sketcher: guesses the tokens beside; places: how many of the window's first places have a second guess; reach:
    tokens that it is long."""

    def __init__(
        self,
        window: int,
        sketcher: Sketcher,
        places: int,
        reach: int = 1,
        widen: Callable[[int], int] | None = None,
    ):
        super().__init__(window, widen)
        self.sketcher, self.places, self.reach, self.wants_features = sketcher, places, reach, sketcher.wants_features

    whole: Observation | None  # all that the last pass taught; `seen` is of the window's places

    @property
    def max_nodes(self) -> int:
        return super().max_nodes + self.places * self.reach

    @property
    def max_depth(self) -> int:
        return max(super().max_nodes, self.places + self.reach - 1)

    def begin(self, start: Start) -> None:
        super().begin(start)
        self.settings, self.keys, self.passes, self.fixed = start.settings, start.keys, 0, start.fixed_noise
        self.chain, self.whole = 0, None
        self.sketcher.begin(start.labels, start.settings.guided, self.places * self.reach + 1)

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self.keys = self.keys[rows]
        self.whole = None if self.whole is None else self.whole.keep(rows)
        self.sketcher.keep(rows)

    def observe(self, seen: Observation) -> None:
        """What the window goes on from are the places of its chain; the sketcher takes in all that was committed."""
        self.whole, width = seen, self.chain + 1
        verdict = replace(seen.verdict, tokens=seen.verdict.tokens[:, :width])
        super().observe(replace(seen, log_p=seen.laws[:, :width], verdict=verdict))

    def propose(self, batch: int, limit: int) -> Draft:
        self.passes += 1
        draft = super().propose(batch, limit)
        self.chain = draft.length
        if self.whole is None or not draft.length:
            return draft
        count = min(self.places, draft.length)
        tokens, laws, near = self._beside(self.whole, draft.tokens[:, :count])
        log_q = None if draft.log_q is None else torch.cat([draft.log_q, *laws], 1)
        margin = None if draft.margin is None else torch.minimum(draft.margin, near)
        comb = comb_tree(draft.length, count, self.reach, draft.tokens.device)
        tokens = [draft.tokens, *tokens]
        return Draft(torch.cat(tokens, 1), log_q, comb, window=True, beside=count, reach=self.reach, margin=margin)

    def _beside(self, seen: Observation, chain: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Second guesses, and what follows them, level by level: tokens int64 [B, n] beside the window's, int64 [B, n],
        the laws [B, n, V] they follow, and the margin [B] of the draws."""
        count = chain.shape[1]
        place, logits = torch.arange(count, device=chain.device), []
        logits.append(self.sketcher.extend(seen)[0])
        for slot in range(count - 1):
            at = place[None, slot : slot + 1]
            sees = torch.ones(1, 1, slot + 1, dtype=torch.bool, device=chain.device)
            logits.append(self.sketcher.grow(chain[:, slot : slot + 1], at, slot, Layout(at, at, sees))[0])
        after, tokens, laws, margins = torch.cat(logits, 1), [], [], []
        parent, sees = place[None], place < place[:, None]  # the window's tokens before each place
        sees = sees[:, : count - 1]
        for step in range(self.reach):
            laws.append(law_of(after, self.settings))
            noise = self._noise(seen, place, step)
            tokens.append(gumbel_argmax(laws[-1], noise))
            outside = (seen.start + seen.committed)[:, None] + place + step >= self.length
            margins.append(gumbel_margin(laws[-1], noise).masked_fill(outside, torch.inf))
            if step + 1 < self.reach:
                first = count - 1 + step * count  # grown before
                sees = torch.cat([sees, torch.eye(count, dtype=torch.bool, device=chain.device)], 1)
                layout = Layout(first + place[None], place[None] + step, sees[None])
                after, _ = self.sketcher.grow(tokens[-1], parent, first, layout)
                parent = first + 1 + place[None]
        return tokens, laws, torch.cat(margins, 1).amin(1)

    def _noise(self, seen: Observation, place: Tensor, step: int) -> Tensor:
        """Gumbel noise [B, n, V] of the guesses `step` tokens behind the second ones. It does not depend on how many
        places there are."""
        if self.fixed:
            return self.noise.rows((seen.start + seen.committed)[:, None] + place + step)
        keys = fold(fold(self.keys, self.passes)[:, None], place + step * self.places)
        return gumbel(fold(keys[..., None], torch.arange(seen.laws.shape[-1], device=place.device)))
