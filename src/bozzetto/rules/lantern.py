"""LANTERN and LANTERN++: a drafted token may borrow the probability of its nearest codes; lossy.

For a drafted token x the set A grows from {x} by the k nearest codes in order of proximity as long as the mass that it
borrows stays within the budget: delta (LANTERN, arXiv 2410.03355) or (lambda - 1) p(x) (LANTERN++, arXiv 2502.06352).
With p~ the law whose mass on A is moved to x, x is kept with probability min(1, p~(x) / q(x)); on a reject the law of
what follows is norm([p~ - q]+). TV(p~, p) is the borrowed mass. p~ depends on x, so the output's own distance from p is
not bounded by delta, and a node with several children spends anew for each of them.

`residual` chooses what follows a reject: `paper`; `optimal`, norm([p - q a]+) with a(v) the probability of keeping v
(COOL-SD, arXiv 2601.09212, Prop. 1), which gives the least bias of any; `released`, what the published code does, kept
so that it can be compared (it removes k + 1 codes whether they were used or not, on drawn trees with the opposite sign,
and falls back to a uniform law).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from bozzetto.drafts import Draft, Verdict
from bozzetto.errors import UsageError
from bozzetto.rules.base import Noise, Rule, given
from bozzetto.rules.tree import after_reject
from bozzetto.rules.walk import Family, Judgement, no_coin, nobody, normalised, step_bias, toss, walk, without

RESIDUALS = ("paper", "optimal", "released")
_ROUNDING = 1e-6  # a budget is not refused for a rounding error


@dataclass
class _Refused:
    """A drafted token x int64 [B, 1] under laws p and q [B, V] (None: certain), its neighbours [B, k], which of
    them are in A, the probability [B] with which it was kept, and what is left of the budget [B]."""

    p: Tensor
    q: Tensor | None
    x: Tensor
    near: Tensor
    inside: Tensor
    keep: Tensor
    slack: Tensor

    def paper(self) -> Tensor:
        """[p~ - q]+: nothing on A, [p - q]+ elsewhere."""
        moved = self.p.scatter(1, self.near, self.p.gather(1, self.near) * ~self.inside).scatter(1, self.x, 0.0)
        return moved if self.q is None else (moved - self.q).clamp_min(0)

    def released(self, wide: Tensor) -> Tensor:
        """Certain drafts: p without x and all its k + 1 neighbours; drawn ones: [p - q]+ with q dropped there.
        wide: int64 [B, k + 2], x and its neighbours."""
        if self.q is None:
            return self.p.scatter(1, wide, 0.0)
        return (self.p - self.q.scatter(1, wide[:, 1:], 0.0)).clamp_min(0)


@dataclass(frozen=True)
class Lantern(Rule):
    """k: neighbours looked at; delta: largest mass borrowed per candidate, in [0, 1]; residual: see above.

    neighbours: int [V, >= k (+ 1 for `released`)], the nearest other codes of each code (set by `with_neighbours`).
    """

    k: int = 1000
    delta: float = 0.1
    residual: str = "paper"
    neighbours: Tensor | None = field(default=None, repr=False, compare=False)

    name: ClassVar[str] = "lantern"
    window: ClassVar[bool] = True
    bias: ClassVar[str] = "each decision's distance from the exact one; at most delta is borrowed per candidate"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UsageError(f"k = {self.k} is not allowed: a whole number >= 1")
        if self.residual not in RESIDUALS:
            raise UsageError(f"residual = {self.residual!r} is not allowed: {', '.join(RESIDUALS)}")
        self._check_budget()

    def _check_budget(self) -> None:
        if not 0 <= self.delta <= 1:
            raise UsageError(f"delta = {self.delta} is not allowed: a number from 0 to 1")

    @property
    def columns(self) -> int:
        """Columns of the neighbour table that are read."""
        return self.k + 1 if self.residual == "released" else self.k

    def budget(self, px: Tensor) -> Tensor:
        """Most mass that a candidate of probability px may borrow."""
        return torch.full_like(px, self.delta)

    def verify(self, draft: Draft, log_p: Tensor, noise: Noise) -> Verdict:
        table = given(self.neighbours, self, "the table of neighbours")

        def judge(family: Family) -> Judgement:
            return self._greedy(family, table) if noise.greedy else self._judge(family, table)

        return walk(draft, log_p, noise, judge)

    def borrowed(self, p: Tensor, x: Tensor, table: Tensor, slack: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What x int64 [B] may borrow under p [B, V]: the mass [B], its neighbours int64 [B, k], which of them are in A
        (bool [B, k])."""
        near = table[x, : self.k].long()
        mass = p.gather(1, near).cumsum(1)
        most = torch.minimum(self.budget(p.gather(1, x[:, None])[:, 0]), slack)
        inside = mass <= most[:, None]
        return (mass * inside).amax(1), near, inside

    def _judge(self, family: Family, table: Tensor) -> Judgement:
        p, q = family.p, family.q
        pick, spent, margin = torch.full_like(family.node, -1), torch.zeros_like(family.slack), no_coin(family)
        everyone = torch.ones_like(pick, dtype=torch.bool)[:, None]
        for rank in range(family.tokens.shape[1]):
            if nobody(family.present[:, rank] & (pick < 0)):
                break
            x, left = family.tokens[:, rank, None], family.slack - spent
            mass, near, inside = self.borrowed(p, x[:, 0], table, left)
            px = p.gather(1, x)[:, 0]
            qx = torch.ones_like(px) if q is None else q.gather(1, x)[:, 0]
            safe = qx.clamp_min(torch.finfo(qx.dtype).tiny)
            exact, keep = (px / safe).clamp_max(1), ((px + mass) / safe).clamp_max(1)
            plain, _ = after_reject(p, q, x[:, 0], everyone)
            rest = self._rest(_Refused(p, q, x, near, inside, keep, left), table, plain)
            bias = step_bias(x, keep, rest, exact, plain)
            dear = bias > left + _ROUNDING
            keep, rest = torch.where(dear, exact, keep), torch.where(dear[:, None], plain, rest)
            tried = family.present[:, rank] & (qx > 0) & (pick < 0)
            stays, margin = toss(family.u[:, rank], keep, tried, margin)
            pick = torch.where(stays, rank, pick)
            spent = torch.where(tried & ~dear, spent + torch.minimum(bias, left), spent)
            failed = (tried & ~stays)[:, None]
            p = torch.where(failed, rest, p)
            q = q if q is None else torch.where(failed, without(q, x[:, 0]), q)
        return Judgement(pick, p, spent, margin)

    def _rest(self, seen: _Refused, table: Tensor, exact: Tensor) -> Tensor:
        """The law [B, V] after x was refused; exact: what the exact rule would go on with."""
        if self.residual == "paper":
            return normalised(seen.paper(), exact)
        if self.residual == "released":
            wide = torch.cat([seen.x, table[seen.x[:, 0], : self.k + 1].long()], 1)
            uniform = torch.full_like(exact, 1 / exact.shape[1])
            return torch.where(seen.inside.any(1, keepdim=True), normalised(seen.released(wide), uniform), exact)
        if seen.q is None:  # nothing but x was ever going to be kept
            own = seen.p.gather(1, seen.x)
            return normalised(seen.p.scatter(1, seen.x, (own - seen.keep[:, None]).clamp_min(0)), exact)
        kept = torch.minimum(seen.q, seen.p + self._borrowed_by_all(seen.p, table, seen.slack))
        return normalised((seen.p - kept).clamp_min(0), exact)

    def _borrowed_by_all(self, p: Tensor, table: Tensor, slack: Tensor) -> Tensor:
        """What every code may borrow, [B, V]: needed for `optimal` on drawn children only."""
        mass = p[:, table[:, : self.k].long()].cumsum(2)  # [B, V, k]
        most = torch.minimum(self.budget(p), slack[:, None])
        return (mass * (mass <= most[..., None])).amax(2)

    def _greedy(self, family: Family, table: Tensor) -> Judgement:
        """Keep the first child that is the likeliest code after borrowing; no coin is thrown."""
        p = family.p
        pick, spent = torch.full_like(family.node, -1), torch.zeros_like(family.slack)
        best = p.amax(1)
        for rank in range(family.tokens.shape[1]):
            x = family.tokens[:, rank]
            mass, _, _ = self.borrowed(p, x, table, family.slack - spent)
            own = p.gather(1, x[:, None])[:, 0]
            keep = family.present[:, rank] & (pick < 0) & (own + mass >= best)
            pick = torch.where(keep, rank, pick)
            spent = torch.where(keep & (own < best), spent + mass, spent)  # the likeliest code needs no leave
        return Judgement(pick, p, spent, no_coin(family))


@dataclass(frozen=True)
class LanternPlusPlus(Lantern):
    """k: neighbours looked at; lambda (`lam`): a candidate may count up to lambda times its own probability, >= 1."""

    k: int = 10
    lam: float = 2.0

    name: ClassVar[str] = "lantern++"
    bias: ClassVar[str] = "each decision's distance from the exact one; a probability is raised at most lambda times"

    def _check_budget(self) -> None:
        if not self.lam >= 1 or self.lam == float("inf"):
            raise UsageError(f"lambda = {self.lam} is not allowed: a number >= 1")

    def budget(self, px: Tensor) -> Tensor:
        return (self.lam - 1) * px
