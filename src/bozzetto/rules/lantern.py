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
from typing import Any, ClassVar

import torch
from torch import Tensor

from bozzetto.drafts import Draft, Verdict
from bozzetto.errors import require
from bozzetto.rules.base import Noise, Rule, given
from bozzetto.rules.own import LANTERN
from bozzetto.rules.walk import Child, Children, Judgement, exact_rest, no_coin, normalised, siblings, step_bias, walk

RESIDUALS = ("paper", "optimal", "released")
_ROUNDING = 1e-6  # a budget is not refused for a rounding error


@dataclass(frozen=True)
class Lantern(Rule):
    """k: neighbours looked at; delta: largest mass borrowed per candidate, in [0, 1]; residual: see above."""

    k: int = 1000
    delta: float = 0.1
    residual: str = "paper"

    name: ClassVar[str] = "lantern"
    about: ClassVar[str] = (
        "Lends a guess the chances of codes that look alike, at most delta in all: more is kept, and "
        "pictures change a little."
    )
    window: ClassVar[bool] = True
    bias: ClassVar[str] = "each decision's distance from the exact one; at most delta is borrowed per candidate"

    def __post_init__(self) -> None:
        require(self.k >= 1, "k", self.k, "a whole number >= 1")
        require(self.residual in RESIDUALS, "residual", self.residual, ", ".join(RESIDUALS))
        require(0 <= self.delta <= 1, "delta", self.delta, "a number from 0 to 1")

    @property
    def columns(self) -> int:  # type: ignore[override]
        """Columns of the neighbour table that are read."""
        return self.k + 1 if self.residual == "released" else self.k

    def budget(self, px: Tensor) -> Tensor:
        """Most mass that a candidate of probability px may borrow."""
        return torch.full_like(px, self.delta)

    def verify(self, draft: Draft, log_p: Tensor, noise: Noise) -> Verdict:
        table = given(noise.neighbours, self, "the table of neighbours")

        def judge(family: Children) -> Judgement:
            if noise.greedy:
                return self._greedy(family, table)
            return siblings(family, lambda child: self._decide(child, table))

        kernel: tuple[Any, ...] | None = None
        if self.residual == "paper" and not noise.greedy:
            kernel = LANTERN, self.k, self.delta, getattr(self, "lam", 0.0)
        return walk(draft, log_p, noise, judge, kernel)

    def borrowed(self, p: Tensor, x: Tensor, table: Tensor, slack: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What x int64 [B] may borrow under p [B, V]: the mass [B], its neighbours int64 [B, k], which of them are in A
        (bool [B, k])."""
        near = table[x, : self.k].long()
        mass = p.gather(1, near).cumsum(1)
        most = torch.minimum(self.budget(p.gather(1, x[:, None])[:, 0]), slack)
        inside = mass <= most[:, None]
        return (mass * inside).amax(1), near, inside

    def _decide(self, child: Child, table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mass, near, inside = self.borrowed(child.p, child.x[:, 0], table, child.left)
        safe = child.qx.clamp_min(torch.finfo(child.qx.dtype).tiny)
        exact, keep = (child.px / safe).clamp_max(1), ((child.px + mass) / safe).clamp_max(1)
        plain = exact_rest(child)
        if self.residual == "paper":
            rest = normalised(_paper(child, near, inside), plain)
        elif self.residual == "released":
            rest = self._released(child, table, inside, plain)
        else:
            rest = self._optimal(child, table, keep, plain)
        bias = step_bias(child.x, keep, rest, exact, plain)
        dear = bias > child.left + _ROUNDING
        keep, rest = torch.where(dear, exact, keep), torch.where(dear[:, None], plain, rest)
        return child.u, keep, rest, torch.where(dear, 0.0, torch.minimum(bias, child.left))

    def _released(self, child: Child, table: Tensor, inside: Tensor, exact: Tensor) -> Tensor:
        """Certain drafts: p without x and all its k + 1 neighbours; drawn ones: [p - q]+ with q dropped there."""
        p, q, near = child.p, child.q, table[child.x[:, 0], : self.k + 1].long()
        if q is None:
            rest = p.scatter(1, torch.cat([child.x, near], 1), 0.0)
        else:
            rest = (p - q.scatter(1, near, 0.0)).clamp_min(0)
        uniform = torch.full_like(exact, 1 / exact.shape[1])
        return torch.where(inside.any(1, keepdim=True), normalised(rest, uniform), exact)

    def _optimal(self, child: Child, table: Tensor, keep: Tensor, exact: Tensor) -> Tensor:
        """[p - q a]+; keep: [B], a(x)."""
        if child.q is None:  # nothing but x was ever going to be kept
            own = (child.p.gather(1, child.x) - keep[:, None]).clamp_min(0)
            return normalised(child.p.scatter(1, child.x, own), exact)
        kept = torch.minimum(child.q, child.p + self._borrowed_by_all(child.p, table, child.left))
        return normalised((child.p - kept).clamp_min(0), exact)

    def _borrowed_by_all(self, p: Tensor, table: Tensor, slack: Tensor) -> Tensor:
        """What every code may borrow, [B, V]: needed for `optimal` on drawn children only."""
        mass = p[:, table[:, : self.k].long()].cumsum(2)  # [B, V, k]
        most = torch.minimum(self.budget(p), slack[:, None])
        return (mass * (mass <= most[..., None])).amax(2)

    def _greedy(self, family: Children, table: Tensor) -> Judgement:
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
    delta: float = field(default=0.1, init=False, repr=False)  # LANTERN's
    lam: float = field(default=2.0, metadata={"option": "lambda"})

    name: ClassVar[str] = "lantern++"
    about: ClassVar[str] = (
        "Counts a guess at most lambda times, on account of codes that look alike: more is kept, and "
        "pictures change a little."
    )
    bias: ClassVar[str] = "each decision's distance from the exact one; a probability is raised at most lambda times"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.lam < float("inf"), "lambda", self.lam, "a number >= 1")

    def budget(self, px: Tensor) -> Tensor:
        return (self.lam - 1) * px


def _paper(child: Child, near: Tensor, inside: Tensor) -> Tensor:
    """[p~ - q]+: nothing on A, [p - q]+ elsewhere. near int64 [B, k]: the neighbours, inside bool: which are in A."""
    p, q = child.p, child.q
    moved = p.scatter(1, near, p.gather(1, near) * ~inside).scatter(1, child.x, 0.0)
    return moved if q is None else (moved - q).clamp_min(0)
