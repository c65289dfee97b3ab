"""What follows a pass of a coupled Jacobi window: law, verdict, commit and the next drafts, for slots of images.

One pure function of tensors, so that it can be compiled into the pass itself (models/compiled.py). Every slot has its
own law, noise, progress and number of drafts; slots of images that have just come in have none. `engine/loop.py` with
`drafters/jacobi.py` is the readable twin: same images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from bozzetto.drafts import Draft
from bozzetto.laws.categorical import gumbel_argmax, gumbel_margin, row_laws
from bozzetto.laws.noise import fold, uniform
from bozzetto.rules.base import Rule, RuleNoise


@dataclass
class SlotState:
    """What the slots hold, all of it changed in place or replaced from pass to pass.

    inputs: int64 [B, W], the last committed token and the drafts after it; count: int64 [B], committed tokens; drafted:
    int64 [B], how many of the drafts are real (0: none yet, the rest fills up); guidance, temperature, top_p: float32
    [B]; top_k: int64 [B] (-1: greedy); keys: int64 [B] of the verifier's noise; passes: int64 [B]; noise: float32 [B,
    P, V], the Gumbel noise of P positions in a ring; tokens: int64 [B, N + W], what is committed and whatever beyond;
    laws: float32 [B, W - 1, V], of the drafts (anything, where the rule needs none).
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
    whether any law has a top-k or a top-p (or is greedy: top-k 1)."""

    def __init__(self, rule: Rule, length: int, widest: int, filtered: bool):
        super().__init__()
        self.rule, self.length, self.widest, self.filtered = rule, length, widest, filtered

    def extra_repr(self) -> str:
        return f"{self.rule}, {self.length}, {self.widest}, {self.filtered}"

    def forward(self, logits: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """logits [R, W, V] of the pass over the first W inputs, [cond; uncond] rows under guidance; state: the tensors
        of SlotState, of which `tokens` is changed in place.

        Returns the next inputs, count, passes and drafted; a report float32 [3, B]: committed tokens, accepted drafts
        and the smallest Gumbel margin of what was committed; and the next laws, where the rule needs them.
        """
        s = SlotState(*state)
        batch, width = len(s.count), logits.shape[1]
        row, place = torch.arange(batch, device=logits.device)[:, None], torch.arange(width, device=logits.device)
        log_p = row_laws(logits, s.guidance, s.temperature, *([s.top_k, s.top_p] if self.filtered else [None, None]))
        position = s.count[:, None] + place
        gumbel = s.noise[row, position % s.noise.shape[1]]
        inside = (place < s.drafted[:, None])[:, : width - 1]
        tokens, accepted = self._verify(s, log_p, gumbel, inside)
        left = self.length - s.count
        committed = torch.minimum(accepted + 1, left)
        s.tokens[row, position] = tokens
        gaps = gumbel_margin(log_p, gumbel).masked_fill(place >= committed[:, None], float("inf"))
        inputs, laws = self._next(s, log_p, tokens, committed)
        report = torch.stack([committed.float(), torch.minimum(accepted, left).float(), gaps.amin(1)])
        drafted = torch.full_like(s.drafted, self.widest - 1)
        found = (inputs, s.count + committed, s.passes + 1, drafted, report)
        return found if laws is None else (*found, laws)

    def _verify(self, s: SlotState, log_p: Tensor, gumbel: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """tokens int64 [B, W] and accepted int64 [B]."""
        rule, width = self.rule, log_p.shape[1]
        uniforms = None
        if rule.needs_uniforms:
            fresh = fold(fold(s.keys, s.passes)[:, None], s.count[:, None] + torch.arange(width, device=s.count.device))
            uniforms = uniform(fold(fresh[..., None], torch.arange(2, device=s.count.device)))
        draft = Draft(s.inputs[:, 1:width], s.laws[:, : width - 1] if rule.needs_law else None)
        verdict = rule.verify(draft, log_p, RuleNoise(gumbel, uniforms))
        if width == 1:
            return verdict.tokens, verdict.accepted
        # A draft that only fills up is none: its place gets the target's own draw, and nothing after it counts.
        first = torch.where(inside[:, 0], verdict.tokens[:, 0], gumbel_argmax(log_p[:, 0], gumbel[:, 0]))
        tokens = torch.cat([first[:, None], verdict.tokens[:, 1:]], 1)
        return tokens, torch.minimum(verdict.accepted, s.drafted)

    def _next(self, s: SlotState, log_p: Tensor, tokens: Tensor, committed: Tensor) -> tuple[Tensor, Tensor | None]:
        """Column j of this pass stands `committed` places further to the left in the next; columns past the real ones
        are drawn from a copy of their last law."""
        batch, width = tokens.shape
        row = torch.arange(batch, device=tokens.device)[:, None]
        last = torch.minimum(s.drafted, torch.full_like(s.drafted, width - 1))[:, None]  # [B, 1], the last real column
        # A slot without an image may stand at the end of one: it commits nothing.
        column = (committed[:, None] - 1).clamp_min(0) + torch.arange(self.widest, device=tokens.device)
        known = tokens.gather(1, torch.minimum(column, last))
        if self.widest == 1:
            return known, None
        noise = s.noise[row, (s.count[:, None] + column) % s.noise.shape[1]]
        entering = gumbel_argmax(log_p.gather(1, last[..., None].expand(-1, -1, log_p.shape[-1])), noise)
        laws = log_p[row, torch.minimum(column, last)[:, 1:]] if self.rule.needs_law else None
        return torch.where(column <= last, known, entering), laws
