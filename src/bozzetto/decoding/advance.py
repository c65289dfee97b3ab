"""What follows a pass of a coupled Jacobi window: law, verdict, commit and the next drafts, for slots of images.

One function of tensors; where our kernels run the passes, they do laws, draws and plain seed-exact windows too
(runtime/laws.py). Every slot has its own law, noise, progress and number of drafts; slots of images that have just come
in have none. `decoding/loop.py` with `drafters/jacobi.py` is the readable twin: same images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from bozzetto.drafts import Draft
from bozzetto.laws.categorical import gumbel_margin, row_laws
from bozzetto.laws.noise import fold, uniform
from bozzetto.rules.base import Noise, Rule
from bozzetto.runtime.laws import gumbel_draw, own_advance, own_laws


@dataclass
class SlotState:
    """What the slots hold, all of it changed in place or replaced from pass to pass.

    inputs: int64 [B, W], the last committed token and the drafts after it; count: int64 [B], committed tokens; drafted:
    int64 [B], how many of the drafts are real (0: none yet, the rest fills up); guidance, temperature, top_p: float32
    [B]; top_k: int64 [B] (-1: greedy); keys: int64 [B] of the verifier's noise; passes: int64 [B]; noise: float32 [B,
    P, V], the Gumbel noise of P positions in a ring; tokens: int64 [B, N + W], what is committed and whatever beyond;
    laws: float32 [B, W - 1, V], of the drafts (anything, where the rule needs none); kept: [B, copies, N + W, narrow],
    what a filler keeps of the target's features (anything without one).
    """

    inputs: Tensor
    count: Tensor
    drafted: Tensor
    guidance: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    keys: Tensor
    passes: Tensor
    noise: Tensor
    tokens: Tensor
    laws: Tensor
    kept: Tensor

    def tensors(self) -> list[Tensor]:
        """In the order of the fields."""
        return [getattr(self, f.name) for f in fields(self)]

    def take(self, found: Sequence[Tensor]) -> Tensor:
        """Go on with what `Advance` gave; returns its report."""
        self.inputs, self.count, self.passes, self.drafted, report, *laws = found
        if laws:
            self.laws = laws[0]
        return report


class Advance(nn.Module):
    """rule: a rule that carries windows on; length: tokens of an image; widest: places of the next inputs; filtered:
    whether any law has a top-k or a top-p (or is greedy: top-k 1); filler: draws the places that enter the window
    (drafters/glance.py; None: a copy of the window's last law); own: laws by our kernels."""

    def __init__(
        self, rule: Rule, length: int, widest: int, filtered: bool, filler: nn.Module | None = None, own: bool = False
    ):
        super().__init__()
        self.rule, self.length, self.widest, self.filtered = rule, length, widest, filtered
        self.own, self.row_laws = own, own_laws if own else row_laws
        self.filler: Any = filler

    def extra_repr(self) -> str:
        return f"{self.rule}, {self.length}, {self.widest}, {self.filtered}"

    def forward(self, logits: Tensor, hidden: Tensor | None, *state: Tensor) -> tuple[Tensor, ...]:
        """logits [R, W, V] of the pass over the first W inputs, [cond; uncond] rows under guidance; hidden [R, W, d]:
        what they are read from, if there is a filler; state: the tensors of SlotState, of which `tokens` and `kept` are
        changed in place.

        Returns the next inputs, count, passes and drafted; a report float32 [3, B]: committed tokens, accepted drafts
        and the margin of this pass's draws and coins; and the next laws, where the rule needs them.
        """
        s = SlotState(*state)
        if self.own and (self.rule.seed_exact or self.rule.couples) and not self.filtered:
            return self._by_kernels(s, logits, hidden)
        batch, width = len(s.count), logits.shape[1]
        row, place = torch.arange(batch, device=logits.device)[:, None], torch.arange(width, device=logits.device)
        log_p = self._laws(s, logits)
        position = s.count[:, None] + place
        gumbel = s.noise[row, position % s.noise.shape[1]]
        inside = (place < s.drafted[:, None])[:, : width - 1]
        tokens, accepted, margins = self._verify(s, log_p, gumbel, inside)
        left = self.length - s.count
        committed = torch.minimum(accepted + 1, left)
        s.tokens[row, position] = tokens
        if self.rule.seed_exact:
            margins = margins.masked_fill(place >= committed[:, None], float("inf"))
        inputs, laws, entering = self._next(s, log_p, hidden, tokens, committed)
        margin = _least(margins, position >= self.length)
        margin = margin if entering is None else torch.minimum(margin, entering)
        if self.filtered:  # greedy rows choose by their logits, whatever was drafted
            lead = _least(self._lead(s, logits), place >= committed[:, None])
            margin = torch.where(s.top_k < 0, lead, margin)
        report = torch.stack([committed.float(), torch.minimum(accepted, left).float(), margin])
        drafted = torch.full_like(s.drafted, self.widest - 1)
        found = (inputs, s.count + committed, s.passes + 1, drafted, report)
        return found if laws is None else (*found, laws)

    def _by_kernels(self, s: SlotState, logits: Tensor, hidden: Tensor | None) -> tuple[Tensor, ...]:
        """The same as one call, but for what a filler draws."""
        filled, drafted = self.filler is not None and self.widest > 1, torch.full_like(s.drafted, self.widest - 1)
        given = own_advance(s, logits, 1 if filled else self.widest, self.length, self.rule.couples)
        (inputs, count, report), laws, log_p = given
        if filled:
            position = s.count[:, None] + torch.arange(logits.shape[1])
            tokens = s.tokens.gather(1, position)
            inputs, laws, entering = self._next(s, log_p, hidden, tokens, count - s.count)
            report[2] = report[2] if entering is None else torch.minimum(report[2], entering)
        found = inputs, count, s.passes + 1, drafted, report
        return found if laws is None else (*found, laws)

    def _verify(self, s: SlotState, log_p: Tensor, gumbel: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens int64 [B, W], accepted int64 [B] and the margins [B, W] of the rule's coins."""
        rule, width = self.rule, log_p.shape[1]
        uniforms = None
        if rule.needs_uniforms:
            fresh = fold(fold(s.keys, s.passes)[:, None], s.count[:, None] + torch.arange(width, device=s.count.device))
            uniforms = uniform(fold(fresh[..., None], torch.arange(2, device=s.count.device)))
        draft = Draft(s.inputs[:, 1:width], s.laws[:, : width - 1] if rule.needs_law else None)
        verdict = rule.verify(draft, log_p, Noise(gumbel, uniforms))
        margins = torch.full_like(log_p[..., 0], float("inf")) if verdict.margin is None else verdict.margin
        if width == 1:
            return verdict.tokens, verdict.accepted, margins
        # A draft that only fills up is none: its place gets the target's own draw, and nothing after it counts.
        if rule.seed_exact:  # whose own token is that draw everywhere
            return verdict.tokens, torch.minimum(verdict.accepted, s.drafted), margins
        drawn, lead = gumbel_draw(log_p[:, 0], gumbel[:, 0])
        first = torch.where(inside[:, 0], verdict.tokens[:, 0], drawn)
        tokens = torch.cat([first[:, None], verdict.tokens[:, 1:]], 1)
        if verdict.margin is not None:
            none, real = s.drafted == 0, torch.nn.functional.pad(inside, (0, 1), value=True)
            alone = torch.where(none, lead, float("inf"))
            margins = torch.minimum(margins.masked_fill(~real | none[:, None], float("inf")), alone[:, None])
        return tokens, torch.minimum(verdict.accepted, s.drafted), margins

    def _lead(self, s: SlotState, logits: Tensor) -> Tensor:
        """Margins [B, W] of greedy choices."""
        plain = self.row_laws(logits, s.guidance, torch.ones_like(s.temperature))
        return gumbel_margin(plain, torch.zeros_like(plain))

    def _laws(self, s: SlotState, logits: Tensor) -> Tensor:
        return self.row_laws(
            logits, s.guidance, s.temperature, *([s.top_k, s.top_p] if self.filtered else [None, None])
        )

    def _next(
        self, s: SlotState, log_p: Tensor, hidden: Tensor | None, tokens: Tensor, committed: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Column j of this pass stands `committed` places further to the left in the next; columns past the real ones
        are drawn by the filler, or from a copy of their last law. The margin [B] of these draws is the third, where the
        rule needs laws: others compare tokens."""
        batch, width = tokens.shape
        row = torch.arange(batch, device=tokens.device)[:, None]
        last = torch.minimum(s.drafted, torch.full_like(s.drafted, width - 1))[:, None]  # [B, 1], the last real column
        # A slot without an image may stand at the end of one: it commits nothing.
        column = (committed[:, None] - 1).clamp_min(0) + torch.arange(self.widest, device=tokens.device)
        known = tokens.gather(1, torch.minimum(column, last))
        if self.widest == 1:
            return known, None, None
        position = s.count[:, None] + column
        noise, outside = s.noise[row, position % s.noise.shape[1]], position >= self.length
        if self.filler is not None and hidden is not None:
            base = self.filler(hidden, s.kept, s.tokens, s.count, committed, self.widest - 1)
            old = (column <= last) & (torch.arange(self.widest, device=row.device) > self.filler.fresh)
            inputs, filled, margins = self._fill(s, base, known, old, noise)
            if not self.rule.needs_law:
                return inputs, None, None
            kept = log_p[row, torch.minimum(column, last)[:, 1:]]
            return inputs, torch.where(old[:, 1:, None], kept, filled), _least(margins, outside[:, 1:])
        law = log_p.gather(1, last[..., None].expand(-1, -1, log_p.shape[-1]))
        drawn, lead = gumbel_draw(law, noise)
        inputs = torch.where(column <= last, known, drawn)
        if not self.rule.needs_law:
            return inputs, None, None
        margin = _least(lead, outside | (column <= last))
        return inputs, log_p[row, torch.minimum(column, last)[:, 1:]], margin

    def _fill(
        self, s: SlotState, base: Tensor, known: Tensor, old: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The next inputs int64 [B, W], `known` where old or first, the filler's laws [B, W - 1, V] of all drafts, and
        the margins [B, W - 1] of what it drew.
        base: its logits [R, K, V]; noise: of the inputs' positions, [B, W, V]. What a law learns from the token before
        is of a first guess at it, drawn with the same noise, unfiltered: one by one they would be a row of small
        kernels for each place."""
        copies, known, first = len(base) // len(known), known[:, 1:], known[:, :1]
        old, noise = old[:, 1:], noise[:, 1:]
        base = base[:, torch.arange(self.widest - 1, device=base.device).clamp_max(base.shape[1] - 1)]
        unfiltered = self.row_laws(base, s.guidance, s.temperature)
        first_guess, first_lead = gumbel_draw(unfiltered, noise)
        guess = torch.where(old, known, first_guess)
        before = self.filler.bias(torch.cat([first, guess[:, :-1]], 1))
        laws = self._laws(s, base + before.repeat(copies, 1, 1))
        drawn, lead = gumbel_draw(laws, noise)
        margins = torch.minimum(first_lead, lead)
        inputs = torch.cat([first, torch.where(old, known, drawn)], 1)
        return inputs, laws, margins.masked_fill(old, float("inf"))


def _least(margins: Tensor, without: Tensor) -> Tensor:
    """The smallest of [B, n] but for those of a mask."""
    return margins.masked_fill(without, float("inf")).amin(1)
