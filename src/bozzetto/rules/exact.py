"""Speculative sampling, applied at every drafted position (maximal coupling).

Position k keeps its draft x with probability min(1, p(x)/q(x)) and otherwise takes a draw from norm([p - q]+); either
way the result has law p (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318). Tokens count as accepted
up to the first one that was not kept. What lies beyond it has law p given the old context: a coupled Jacobi drafter
carries it on together with that law (SCD, arXiv 2510.24211; SJD-PAC, arXiv 2603.18599), other drafters discard it.

A window may have second guesses y, drawn from laws s of their own: where x is refused, y is kept with probability
min(1, r(y)/s(y)) for r = norm([p - q]+), else the draw is from norm([r - s]+) (as SpecInfer's siblings, arXiv
2305.09781). Where the first refused x has such a y that is kept, the token behind y has been scored as well.
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
    beside: ClassVar[bool] = True
    trees: ClassVar[bool] = False

    def verify(self, draft: Draft, log_p: Tensor, noise: RuleNoise) -> Verdict:
        if noise.gumbel is None or (draft.tree is not None and not draft.beside):
            raise ValueError("rule 'exact' needs a chain and the positions' Gumbel noise")
        chain = draft.length - draft.beside
        # Behind the last draft: a plain draw of p.
        after = gumbel_argmax(log_p[:, chain : chain + 1], noise.gumbel[:, chain : chain + 1])
        if chain == 0:
            return Verdict(after, torch.zeros_like(after[:, 0]))
        log_q = point_mass(draft.tokens, log_p[:, :-1]) if draft.certain else draft.log_q
        if log_q is None or noise.uniforms is None:
            raise ValueError("rule 'exact' needs the draft's law and fresh uniforms")
        given = (log_p[:, :chain], log_q[:, :chain], noise.uniforms[:, :chain, :2])
        tokens, keep = couple(draft.tokens[:, :chain], *given)
        if draft.beside:
            return _with_second(draft, log_p, log_q, noise.uniforms, torch.cat([tokens, after], 1), keep)
        return Verdict(torch.cat([tokens, after], 1), leading(keep))


def _with_second(draft: Draft, log_p: Tensor, log_q: Tensor, uniforms: Tensor, tokens: Tensor, keep: Tensor) -> Verdict:
    """The verdict on a comb, from that on its chain of L: tokens int64 [B, L + 1], keep bool [B, L]."""
    chain, count = keep.shape[1], draft.beside
    y, log_s = draft.tokens[:, chain:], log_q[:, chain:]
    rest = residual(log_p[:, :count], log_q[:, :count])
    rest = rest / rest.sum(-1, keepdim=True)
    s, u = log_s.exp(), uniforms[:, :count]
    here = y[..., None]
    taken = u[..., 2] * s.gather(-1, here)[..., 0] < rest.gather(-1, here)[..., 0]
    left = (rest - s).clamp_min(0)
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, rest)  # else a reject has probability zero
    second = torch.where(taken, y, weighted_draw(left, u[..., 1]))
    tokens = torch.cat([torch.where(keep[:, :count], tokens[:, :count], second), tokens[:, count:]], 1)
    accepted = leading(keep)
    at = accepted[:, None].clamp_max(count - 1)
    onto = (accepted < count) & (taken & ~keep[:, :count]).gather(1, at)[:, 0]  # the way goes on to the second guess
    row = torch.arange(len(tokens), device=tokens.device)
    bonus = weighted_draw(log_p[row, chain + 1 + at[:, 0]].exp(), uniforms[row, at[:, 0], 3])
    behind = torch.where(onto[:, None], at + 1, chain + 1)
    tokens = torch.nn.functional.pad(tokens, (0, 1)).scatter(1, behind, bonus[:, None])[:, : chain + 1]
    return Verdict(tokens, accepted + onto, way_through_comb(accepted, onto, chain))


def way_through_comb(accepted: Tensor, onto: Tensor, chain: int) -> Tensor:
    """int64 [B, L + 1], the scored index of every place of the accepted path. accepted: int64 [B], of the chain; onto:
    bool [B], whether the second guess behind them is taken."""
    level = torch.arange(chain + 1, device=accepted.device)
    leaf = torch.where(onto, chain + 1 + accepted, accepted)[:, None]
    return torch.where(level <= accepted[:, None], level, leaf)


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
