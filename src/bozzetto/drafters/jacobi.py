"""Coupled Jacobi window: the target's own, one-pass-stale samples are the draft (no training, no second model).

One pass gives a law at every window position. The rule's tokens there (coupled to the previous ones by fixed Gumbel
noise or by the keep-or-residual test) are the next draft, and the laws they follow are the next draft laws, for kept
and redrawn tokens alike. Positions that enter the window are drawn from a copy of the last law of the window.
Speculative Jacobi decoding: arXiv 2410.01699; coupling: SCD, arXiv 2510.24211.

`FilledJacobi`: new slots of the window are filled by a trained drafter: coupling keeps what the target has already
said, and the drafter's law replaces the copy of the window's last law where nothing is known yet.

`SecondGuess`: beside the tokens that the target drew a pass ago, which an earlier reject may have made stale, stand
tokens that a trained drafter draws after what is committed now. Every pass ends at a reject, and there the second guess
may be right; then one more token is known behind it. Windows and drafters fail in different places, so that the two
gains add up.

`JacobiVectors`, the continuous form: one pass gives every place of a window a trajectory of the target's law given the
drafts before it; under the next pass's contexts the rule couples these to new ones or runs them again with the same
noise. A place that enters the window has none of the target's yet. Its first draft is a Gaussian around the drafted or
committed tokens beside and above it, whose chain has a closed form (laws/gaussian.py); it costs no call of the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bozzetto.drafters.base import Drafter, DraftModel, Observation, Start
from bozzetto.drafts import Draft, Layout
from bozzetto.drafts.tree import comb_tree, link
from bozzetto.laws.categorical import LawSettings, gumbel_argmax, gumbel_margin
from bozzetto.laws.chain import Ancestry, Trajectory
from bozzetto.laws.gaussian import gaussian_chain
from bozzetto.laws.noise import fold, gumbel
from bozzetto.runtime.gauss import own_gaussian
from bozzetto.runtime.laws import gumbel_draw

_ABOVE = 0.47  # how a latent follows the one above it, measured on photographs


def smallest(margins: Tensor) -> Tensor:
    """[B, n] -> [B]; inf where there are none."""
    return margins.amin(1) if margins.shape[1] else torch.full_like(margins.sum(1), torch.inf)


def _entering(seen: Observation, column: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What enters a window that is at columns int64 [B, L] of the last one: the places scored of each image, int64 [B,
    1]; columns int64 [B, n] and numbers int64 [n] of those behind; where a column is found in the last window and these
    behind it, int64 [B, L]."""
    width, least = seen.widths()
    new = torch.arange(max(0, seen.longest + column.shape[1] - least), device=column.device)
    behind = seen.verdict.tokens.shape[1] - width
    return width, width + new, new, torch.where(column < width, column, column + behind)


class Jacobi(Drafter):
    """window: scored positions per pass W (1 is sequential decoding); W - 1 of them are drafted.

    widen: window for the number of images still in progress, where it may change with that (wider as images finish).
    """

    name = "jacobi"
    draws_fixed = True  # places that enter the window

    def __init__(self, window: int, widen: Callable[[int], int] | None = None):
        self.window, self.widen = window, widen

    @property
    def max_nodes(self) -> int:
        return (max(self.window, self.widen(1)) if self.widen else self.window) - 1

    def propose(self, batch: int, limit: int) -> Draft:
        seen = self.seen
        length = min(limit, (self.widen(batch) if self.widen else self.window) - 1)
        if seen is None or length < 1:  # nothing is known before the first pass: it runs without drafts
            return self.nothing(batch)
        # Slot s of this window stood at column committed + s of the last one; columns past its end are new.
        column = seen.committed[:, None] + torch.arange(length, device=self.keys.device)  # [B, L]
        tokens, laws, margin = self._window(seen, column)
        return Draft(tokens, laws, window=True, margin=margin)

    def _window(self, seen: Observation, column: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Tokens int64 [B, L] of the window's slots and, where the rule asks for them, their laws [B, L, V] and the
        margin [B] of those drawn here."""
        width, place, new, index = _entering(seen, column)
        rows = torch.arange(len(column), device=column.device)[:, None]
        position = seen.start[:, None] + place
        drawn, lead = gumbel_draw(seen.laws[rows, width - 1], self.start.noise.rows(position))
        tokens = torch.cat([seen.verdict.tokens, drawn], 1).gather(1, index)
        if not self.start.with_laws:
            return tokens, None, None
        # The images of a batch reach differently far: what nobody reads, or lies behind the end, does not count.
        unread = (position >= self.start.length) | (new > column[:, -1:] - width)
        margin = lead.masked_fill(unread, torch.inf)
        return tokens, seen.laws[rows, torch.minimum(column, width - 1)], smallest(margin)


class FilledJacobi(Jacobi):
    """model: fills the slots that enter the window, each after the token drafted before it; fresh: drafts at the
    head of the window that it fills in every pass: right behind a reject the target's own are the most out of date."""

    def __init__(self, window: int, model: DraftModel, fresh: int = 0, widen: Callable[[int], int] | None = None):
        super().__init__(window, widen)
        self.model, self.fresh = model, fresh

    @property
    def grown(self) -> int:
        return self.max_nodes + 1

    def _window(self, seen: Observation, column: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        width, _ = seen.widths()
        rows, told = torch.arange(len(column), device=column.device)[:, None], torch.minimum(column, width - 1)
        known = (column < width) & (torch.arange(column.shape[1], device=column.device) >= self.fresh)
        old = seen.verdict.tokens.gather(1, told)
        noise = self.start.noise.rows(seen.start[:, None] + column)
        fill = self._at_once if self.model.at_once else self._one_by_one
        tokens, laws, margins = fill(seen, old, known, noise)
        if not self.start.with_laws:
            return tokens, None, None
        kept = seen.laws[rows, told]
        settled = known | (seen.start[:, None] + column >= self.start.length)
        return tokens, torch.where(known[..., None], kept, laws), smallest(margins.masked_fill(settled, torch.inf))

    def _one_by_one(
        self, seen: Observation, old: Tensor, known: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens int64 [B, L], `old` where known bool [B, L], the model's laws [B, L, V], each drawn after the token
        before it, and the margins [B, L]. noise: [B, L, V]."""
        tokens, laws, length = [], [], old.shape[1]
        logits, _ = self.model.extend(seen)
        for slot in range(length):
            laws.append(self.model.law(logits, self.start.settings))  # [B, 1, V]
            drawn = gumbel_argmax(laws[-1], noise[:, slot : slot + 1])
            tokens.append(torch.where(known[:, slot : slot + 1], old[:, slot : slot + 1], drawn))
            if slot + 1 < length:
                layout = link(slot, old.device)
                logits, _ = self.model.grow(tokens[-1], layout.slot, slot, layout)
        law = torch.cat(laws, 1)
        return torch.cat(tokens, 1), law, gumbel_margin(law, noise)

    def _at_once(self, seen: Observation, old: Tensor, known: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same of a model that knows all places at once: what it learns from the token before, it learns from a
        first guess at it, drawn with the same noise, unfiltered, and so mostly the same."""
        base = self.model.bases(seen)
        place = torch.arange(old.shape[1], device=old.device).clamp_max(base.shape[1] - 1)  # behind the last: its law
        base = base[:, place]
        unfiltered = LawSettings(self.start.settings.guidance, self.start.settings.temperature or 1.0)
        first = self.model.law(base, unfiltered)
        drawn, lead = gumbel_draw(first, noise)
        guess = torch.where(known, old, drawn)
        last = seen.verdict.tokens.gather(1, seen.committed[:, None] - 1)
        laws = self.model.law(base + self.model.after(torch.cat([last, guess[:, :-1]], 1)), self.start.settings)
        drawn, margins = gumbel_draw(laws, noise)
        return torch.where(known, old, drawn), laws, torch.minimum(lead, margins)


class SecondGuess(Jacobi):
    """model: guesses the tokens beside; places: how many of the window's first places have a second guess; reach:
    tokens that it is long."""

    def __init__(
        self,
        window: int,
        model: DraftModel,
        places: int,
        reach: int = 1,
        widen: Callable[[int], int] | None = None,
    ):
        super().__init__(window, widen)
        self.model, self.places, self.reach = model, places, reach

    whole: Observation | None  # all that the last pass taught; `seen` is of the window's places

    @property
    def max_nodes(self) -> int:
        return super().max_nodes + self.places * self.reach

    @property
    def max_depth(self) -> int:
        return max(super().max_nodes, self.places + self.reach - 1)

    @property
    def grown(self) -> int:
        return self.places * self.reach + 1

    def begin(self, start: Start) -> None:
        super().begin(start)
        self.chain, self.whole = 0, None

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self.whole = None if self.whole is None else self.whole.keep(rows)

    def join(self, other: Any) -> None:
        super().join(other)
        assert self.whole is not None and other.whole is not None
        self.whole = self.whole.join(other.whole)

    def observe(self, seen: Observation) -> None:
        """What the window goes on from are the places of its chain; the model takes in all that was committed."""
        self.whole, width = seen, self.chain + 1
        verdict = replace(seen.verdict, tokens=seen.verdict.tokens[:, :width])
        super().observe(replace(seen, log_p=seen.laws[:, :width], verdict=verdict))

    def propose(self, batch: int, limit: int) -> Draft:
        self.passes = self.passes + 1
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
        logits.append(self.model.extend(seen)[0])
        for slot in range(count - 1):
            layout = link(slot, chain.device)
            logits.append(self.model.grow(chain[:, slot : slot + 1], layout.slot, slot, layout)[0])
        after, tokens, laws, margins = torch.cat(logits, 1), [], [], []
        parent, sees = place[None], place < place[:, None]  # the window's tokens before each place
        sees = sees[:, : count - 1]
        for step in range(self.reach):
            laws.append(self.model.law(after, self.start.settings))
            noise = self._noise(seen, place, step)
            drawn, lead = gumbel_draw(laws[-1], noise)
            tokens.append(drawn)
            outside = (seen.start + seen.committed)[:, None] + place + step >= self.start.length
            margins.append(lead.masked_fill(outside, torch.inf))
            if step + 1 < self.reach:
                first = count - 1 + step * count  # grown before
                sees = torch.cat([sees, torch.eye(count, dtype=torch.bool, device=chain.device)], 1)
                layout = Layout(first + place[None], place[None] + step, sees[None])
                after, _ = self.model.grow(tokens[-1], parent, first, layout)
                parent = first + 1 + place[None]
        return tokens, laws, torch.cat(margins, 1).amin(1)

    def _noise(self, seen: Observation, place: Tensor, step: int) -> Tensor:
        """Gumbel noise [B, n, V] of the guesses `step` tokens behind the second ones. It does not depend on how many
        places there are."""
        if self.start.fixed_noise:
            return self.start.noise.rows((seen.start + seen.committed)[:, None] + place + step)
        keys = fold(fold(self.keys, self.passes)[:, None], place + step * self.places)
        return gumbel(fold(keys[..., None], torch.arange(seen.laws.shape[-1], device=place.device)))


class JacobiVectors(Jacobi):
    """window: scored places per pass W (1 is sequential decoding); W - 1 of them are drafted.

    grid: tokens per side; ancestry, std float64 [T]: the target's sampler; spread: deviation of a token around what the
    one above it says, which the first drafts assume, in token units; own: whether our kernels draw first drafts.
    """

    dim: int

    def __init__(
        self,
        window: int,
        grid: int,
        dim: int,
        ancestry: Ancestry,
        std: Tensor,
        spread: float = 1.0,
        own: bool = False,
    ):
        super().__init__(window)
        self.grid, self.dim, self.own = grid, dim, own
        self.ancestry, self.std, self.spread = ancestry, std, spread

    def begin(self, start: Start) -> None:
        super().begin(start)
        self.tempered = (self.std * start.settings.temperature).float()  # rounded as the law's
        batch, device = len(start.labels), start.labels.device
        # Committed and drafted tokens after one row of zeros, so that every place has one above it.
        self.known = torch.zeros(batch, start.length + 2 * self.window + self.grid, self.dim, device=device)

    def propose(self, batch: int, limit: int) -> Draft:
        # Up to the image's last place, so that what happens there does not depend on batch mates that are behind.
        length = min(limit, self.window - 1)
        if length < 1:
            return self.nothing(batch)
        device = self.known.device
        offset = torch.arange(length, device=device)
        if self.seen is None:
            count = torch.zeros(batch, dtype=torch.int64, device=device)
            trajectory = self._first(count[:, None] + offset)
        else:
            seen = self.seen
            tokens, old = seen.verdict.tokens, seen.verdict.trajectory
            old = _only_tokens(tokens) if old is None else old
            # Slot s of this window stood at column committed + s of the last one; columns past its end are new.
            count, column = seen.start + seen.committed, seen.committed[:, None] + offset
            _, place, _, index = _entering(seen, column)
            rows = torch.arange(batch, device=device)[:, None]
            both = zip(old, self._first(seen.start[:, None] + place), strict=True)
            trajectory = Trajectory(*(torch.cat([kept, added], 1)[rows, index] for kept, added in both))
        if self.window > self.grid:  # else the places that enter stand below committed ones
            self._write(count, trajectory.token)
        return Draft(trajectory.token, trajectory=trajectory) if self.start.with_laws else Draft(trajectory.token)

    def _write(self, start: Tensor, tokens: Tensor) -> None:
        place = self.grid + start[:, None] + torch.arange(tokens.shape[1], device=start.device)
        self.known[torch.arange(len(start), device=start.device)[:, None], place] = tokens

    def _first(self, position: Tensor) -> Trajectory:
        """First drafts at positions int64 [B, L]: trajectories [B, L, ...], with the positions' own noise."""
        rows = torch.arange(len(position), device=position.device)[:, None]
        centre = _ABOVE * self.known[rows, position].flatten(0, 1)  # the token above
        noise = self.start.noise.rows(position).flatten(0, 1)
        if self.own:
            variance, sampler = torch.full_like(centre, self.spread**2), (self.ancestry, self.tempered, None, None)
            trajectory = own_gaussian(centre, variance, sampler, noise)
        else:
            spread, shape = torch.full_like(centre, self.spread), (len(position), position.shape[1])
            trajectory = gaussian_chain(centre, spread, self.ancestry, self.tempered, shape).sample(noise)
        trajectory = Trajectory(*(part.unflatten(0, position.shape) for part in trajectory))
        return trajectory if self.start.with_laws else _only_tokens(trajectory.token)

    def observe(self, seen: Observation) -> None:
        self._write(seen.start, seen.verdict.tokens)
        super().observe(seen)

    def keep(self, rows: Tensor) -> None:
        self.known = self.known[rows]
        super().keep(rows)

    def join(self, other: Any) -> None:
        super().join(other)
        self.known = torch.cat([self.known, other.known])


def _only_tokens(tokens: Tensor) -> Trajectory:
    """Tokens [B, L, D] as trajectories of one state."""
    return Trajectory(tokens[:, :, None], tokens[:, :, None, :0], tokens[:, :, None, :0])
