"""Speculative sampling, applied at every drafted position (maximal coupling).

Position k keeps its draft x with probability min(1, p(x)/q(x)) and otherwise takes a draw from norm([p - q]+); either
way the result has law p (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318). Tokens count as accepted
up to the first one that was not kept. What lies beyond it has law p given the old context: a coupled Jacobi drafter
carries it on together with that law (SCD, arXiv 2510.24211; SJD-PAC, arXiv 2603.18599), other drafters discard it.

A window may have second guesses y, drawn from laws s of their own: where x is refused, y is kept with probability
min(1, r(y)/s(y)) for r = norm([p - q]+), else the draw is from norm([r - s]+) (as SpecInfer's siblings, arXiv
2305.09781). Where the first refused x has such a y that is kept, what was drafted behind y is tested in turn, and the
token behind that has been scored as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bozzetto.drafts import Draft, Verdict
from bozzetto.laws.categorical import coin_margin, weighted_draw
from bozzetto.rules.base import Noise, Rule, leading
from bozzetto.runtime.laws import gumbel_draw


@dataclass(frozen=True)
class Exact(Rule):
    """Keep-or-residual at every drafted position of a chain; lossless in law."""

    name: ClassVar[str] = "exact"
    about: ClassVar[str] = (
        "Keeps a draft as often as its law and the model's overlap, and draws again from what is left over: "
        "another picture, as likely as before."
    )
    exact: ClassVar[bool] = True
    needs_fixed: ClassVar[bool] = True
    window: ClassVar[bool] = True
    beside: ClassVar[bool] = True
    trees: ClassVar[bool] = False
    fused: ClassVar[bool] = True
    couples: ClassVar[bool] = True

    def verify(self, draft: Draft, log_p: Tensor, noise: Noise) -> Verdict:
        if noise.fixed is None or (draft.tree is not None and not draft.beside):
            raise ValueError("rule 'exact' needs a chain and the positions' Gumbel noise")
        chain = draft.chain
        # Behind the last draft: a plain draw of p.
        last = log_p[:, chain : chain + 1], noise.fixed[:, chain : chain + 1]
        after, margin = gumbel_draw(*last)
        if chain == 0:
            return Verdict(after, torch.zeros_like(after[:, 0]), margin=margin)
        log_q = point_mass(draft.tokens, log_p[:, :-1]) if draft.certain else draft.log_q
        if log_q is None or noise.uniforms is None:
            raise ValueError("rule 'exact' needs the draft's law and fresh uniforms")
        given = (log_p[:, :chain], log_q[:, :chain], noise.uniforms[:, :chain, :2])
        tokens, keep, margins = couple(draft.tokens[:, :chain], *given)
        found = Verdict(torch.cat([tokens, after], 1), leading(keep), margin=torch.cat([margins, margin], 1))
        return _with_second(draft, log_p, log_q, noise.uniforms, found, keep) if draft.beside else found


def _with_second(draft: Draft, log_p: Tensor, log_q: Tensor, uniforms: Tensor, found: Verdict, keep: Tensor) -> Verdict:
    """The verdict on a comb, from that on its chain of L and keep bool [B, L]."""
    chain, count, reach = draft.chain, draft.beside, draft.reach
    tokens, before = found.tokens, found.accepted
    assert found.margin is not None
    u, y = uniforms[:, :count], draft.tokens[:, chain:].unflatten(1, (reach, count))  # [B, R, n]
    s, at_branch = (part[:, -reach * count :].unflatten(1, (reach, count)) for part in (log_q, log_p))
    second, taken, margin = _second(y[:, 0], log_p[:, :count], log_q[:, :count], s[:, 0].exp(), u)
    margins = torch.nn.functional.pad(found.margin, (0, reach), value=torch.inf)
    margins[:, :count] = torch.minimum(margins[:, :count], margin.masked_fill(keep[:, :count], torch.inf))
    tokens = torch.cat([torch.where(keep[:, :count], tokens[:, :count], second), tokens[:, count:]], 1)
    at = before.clamp_max(count - 1)
    row = torch.arange(len(tokens), device=tokens.device)
    onto = (before < count) & (taken & ~keep[:, :count])[row, at]  # the way goes on to the second guess
    line, kept, branch = [second[row, at]], [], []
    for step in range(1, reach):
        pair = u[..., 2 + 2 * step : 4 + 2 * step]
        drawn, held, margin = (part[row, at] for part in couple(y[:, step], at_branch[:, step - 1], s[:, step], pair))
        line.append(drawn)
        kept.append(held)
        branch.append(margin)
    drawn, margin = weighted_draw(at_branch[row, -1, at].exp(), u[row, at, 3])
    line.append(drawn)
    near = torch.stack([*branch, margin], 1).masked_fill(~onto[:, None], torch.inf)
    margins = margins.scatter_reduce(1, before[:, None] + 1 + torch.arange(reach, device=at.device), near, "amin")
    more = leading(torch.stack(kept, 1)) if kept else torch.zeros_like(at)
    assert draft.tree is not None
    node = torch.where(onto, chain + 1 + more * count + at, before)
    tokens = torch.nn.functional.pad(tokens, (0, draft.depth + 1 + reach - chain))
    place = before[:, None] + torch.arange(reach + 1, device=at.device)
    told = onto[:, None] & (place <= (before + more + 1)[:, None])
    spare = torch.where(told, place, tokens.shape[1] - 1)
    tokens = tokens.scatter(1, spare, torch.stack(line, 1))[:, : draft.depth + 1]
    return Verdict(tokens, before + onto * (1 + more), draft.tree.path[0, node], margin=margins)


def _second(y: Tensor, log_p: Tensor, log_q: Tensor, s: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a place becomes where the window's token was refused: int64 [B, n], whether that is y, bool [B, n], and the
    margin. y: int64 [B, n], drawn from s [B, n, V]; u: float64 [B, n, U]."""
    rest = residual(log_p, log_q)
    total = rest.sum(-1, keepdim=True)
    rest = rest / total
    here = y[..., None]
    coin, chance = u[..., 2] * s.gather(-1, here)[..., 0], rest.gather(-1, here)[..., 0]
    taken = coin < chance
    left = (rest - s).clamp_min(0)
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, rest)  # else a reject has probability zero
    drawn, margin = weighted_draw(left, u[..., 1])
    # Differences have the errors of what they are differences of, and these are the larger the less is left.
    margin = (margin * (left.sum(-1) * total[..., 0])).masked_fill(taken, torch.inf)
    error = (log_p.gather(-1, here).exp() / total)[..., 0]
    margin = torch.minimum(margin, ((coin - chance).abs() / error).float())
    return torch.where(taken, y, drawn), taken, margin.nan_to_num(nan=torch.inf)


def couple(drafted: Tensor, log_p: Tensor, log_q: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of the laws log_p [B, L, V] that are as often as possible the drafted ones int64 [B, L], which were drawn
    from log_q [B, L, V]. uniforms: float64 [B, L, 2] -> (tokens int64 [B, L], kept bool [B, L], margins [B, L])."""
    u_test, u_draw = uniforms.unbind(-1)
    x = drafted[..., None]
    log_ratio = (log_p.gather(-1, x) - log_q.gather(-1, x)).squeeze(-1)
    keep = u_test < log_ratio.double().exp()
    redrawn, margin = weighted_draw(residual(log_p, log_q), u_draw)
    margin = torch.minimum(coin_margin(u_test, log_ratio), margin.masked_fill(keep, torch.inf))
    return torch.where(keep, drafted, redrawn), keep, margin


def residual(log_p: Tensor, log_q: Tensor) -> Tensor:
    """[p - q]+, unnormalised; p itself where p and q agree to rounding (a reject there has probability zero)."""
    p = log_p.exp()
    rest = (p - log_q.exp()).clamp_min(0)
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)


def point_mass(tokens: Tensor, like: Tensor) -> Tensor:
    """The log-law that is certain of a token: int64 [B, L] -> [B, L, V]."""
    return torch.full_like(like, -torch.inf).scatter_(-1, tokens[..., None], 0.0)
