"""Speculative sampling, applied at every drafted position (maximal coupling).

Position k keeps its draft x with probability min(1, p(x)/q(x)) and otherwise takes a draw from norm([p - q]+); either
way the result has law p (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318). Tokens count as accepted
up to the first one that was not kept. What lies beyond it has law p given the old context: a coupled Jacobi drafter
carries it on together with that law (SCD, arXiv 2510.24211; SJD-PAC, arXiv 2603.18599), other drafters discard it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bozzetto.drafts import Draft, Verdict
from bozzetto.laws.categorical import gumbel_argmax, weighted_draw
from bozzetto.rules.base import Rule, RuleNoise, leading


@dataclass(frozen=True)
class Exact(Rule):
    """Keep-or-residual at every drafted position of a chain; lossless in law."""

    name: ClassVar[str] = "exact"
    exact: ClassVar[bool] = True
    needs_gumbel: ClassVar[bool] = True
    window: ClassVar[bool] = True
    trees: ClassVar[bool] = False

    def verify(self, draft: Draft, log_p: Tensor, noise: RuleNoise) -> Verdict:
        if noise.gumbel is None or draft.tree is not None:
            raise ValueError("rule 'exact' needs a chain and the positions' Gumbel noise")
        after = gumbel_argmax(log_p[:, -1:], noise.gumbel[:, -1:])  # no draft there: a plain draw of p
        if draft.length == 0:
            return Verdict(after, torch.zeros_like(after[:, 0]))
        log_p = log_p[:, :-1]
        log_q = point_mass(draft.tokens, log_p) if draft.certain else draft.log_q
        if log_q is None or noise.uniforms is None:
            raise ValueError("rule 'exact' needs the draft's law and fresh uniforms")
        tokens, keep = couple(draft.tokens, log_p, log_q, noise.uniforms[:, :-1])
        return Verdict(torch.cat([tokens, after], 1), leading(keep))


def couple(drafted: Tensor, log_p: Tensor, log_q: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of the laws log_p [B, L, V] that are as often as possible the drafted ones int64 [B, L], which were drawn
    from log_q [B, L, V]. uniforms: float64 [B, L, 2] -> (tokens int64 [B, L], kept bool [B, L])."""
    u_test, u_draw = uniforms.unbind(-1)
    x = drafted[..., None]
    log_ratio = log_p.gather(-1, x) - log_q.gather(-1, x)
    keep = u_test < log_ratio.squeeze(-1).double().exp()
    redrawn = weighted_draw(residual(log_p, log_q), u_draw)
    return torch.where(keep, drafted, redrawn), keep


def residual(log_p: Tensor, log_q: Tensor) -> Tensor:
    """[p - q]+, unnormalised; p itself where p and q agree to rounding (a reject there has probability zero)."""
    p = log_p.exp()
    rest = (p - log_q.exp()).clamp_min(0)
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)


def point_mass(tokens: Tensor, like: Tensor) -> Tensor:
    """The log-law that is certain of a token: int64 [B, L] -> [B, L, V]."""
    return torch.full_like(like, -torch.inf).scatter_(-1, tokens[..., None], 0.0)
