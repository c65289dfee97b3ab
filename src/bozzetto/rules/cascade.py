"""CASCADE: siblings that the drafter finds alike pool their probability, and converging laws are trusted; lossy.

Breadth: a drafted token counts the probability of all its siblings whose drafter hidden state has a cosine above
`alike` with its own. Depth: where the target's logits at the token are close to those at its parent (cosine above
`converged`, divergence below `kl`), the probability of keeping it is raised by `raise_by` times that cosine. A reject
goes on with norm([p - q]+) (arXiv 2605.07230; its thresholds are given there only as ranges, 0.9 for the siblings, 0.5
to 0.625 and 3 to 4 for the laws, so the defaults here are approximate, and so is the order in which the two are
combined).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bozzetto.drafts import Draft, Verdict
from bozzetto.errors import UsageError
from bozzetto.rules.base import Noise, Rule, given
from bozzetto.rules.tree import after_reject
from bozzetto.rules.walk import Family, Judgement, greedy_choice, no_coin, nobody, step_bias, toss, walk


@dataclass(frozen=True)
class Cascade(Rule):
    """alike, converged: cosines in [-1, 1]; kl: nats; raise_by: in [0, 1] (0: breadth only)."""

    alike: float = 0.9
    converged: float = 0.6
    kl: float = 3.0
    raise_by: float = 0.1

    name: ClassVar[str] = "cascade"
    needs_hidden: ClassVar[bool] = True
    bias: ClassVar[str] = "each decision's distance from the exact one; without a bound of its own"

    def __post_init__(self) -> None:
        for name in ("alike", "converged"):
            if not -1 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} = {getattr(self, name)} is not allowed: a number from -1 to 1")
        if not self.kl >= 0:
            raise UsageError(f"kl = {self.kl} is not allowed: a number >= 0")
        if not 0 <= self.raise_by <= 1:
            raise UsageError(f"raise_by = {self.raise_by} is not allowed: a number from 0 to 1")

    def verify(self, draft: Draft, log_p: Tensor, noise: Noise) -> Verdict:
        hidden = given(draft.hidden, self, "the drafter's hidden states") if draft.length else log_p[..., :1]
        states = F.normalize(hidden.float(), dim=-1)  # without drafts nobody asks for them

        def judge(family: Family) -> Judgement:
            rows = torch.arange(len(log_p), device=log_p.device)[:, None]
            own = states[rows, family.kids]  # [B, C, d]
            pool = own @ own.transpose(1, 2) > self.alike
            pool = pool & family.present[:, None] | torch.eye(own.shape[1], dtype=torch.bool, device=own.device)
            lift = self._lift(log_p[rows, family.node[:, None]], log_p[rows, family.kids])
            return self._greedy(family, pool, lift) if noise.greedy else self._judge(family, pool, lift)

        return walk(draft, log_p, noise, judge)

    def _lift(self, parent: Tensor, child: Tensor) -> Tensor:
        """What convergence adds to the keeping probability, [B, C]; parent [B, 1, V], child [B, C, V] log-laws."""
        a, b = (law.clamp_min(-30) for law in (parent, child))
        a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
        cosine = F.cosine_similarity(a, b, dim=-1)
        divergence = (parent.exp() * (parent.clamp_min(-30) - child.clamp_min(-30))).sum(-1)
        return torch.where((cosine > self.converged) & (divergence < self.kl), self.raise_by * cosine, 0.0)

    def _judge(self, family: Family, pool: Tensor, lift: Tensor) -> Judgement:
        """pool: bool [B, C, C], who counts for whom; lift: float [B, C]."""
        p, q = family.p, family.q
        pick, spent, margin = torch.full_like(family.node, -1), torch.zeros_like(family.slack), no_coin(family)
        for rank in range(family.tokens.shape[1]):
            if nobody(family.present[:, rank] & (pick < 0)):
                break
            x = family.tokens[:, rank, None]
            px = p.gather(1, x)[:, 0]
            qx = torch.ones_like(px) if q is None else q.gather(1, x)[:, 0]
            safe = qx.clamp_min(torch.finfo(px.dtype).tiny)
            pooled = (p.gather(1, family.tokens) * pool[:, rank]).sum(1)
            exact = (px / safe).clamp_max(1)
            keep = ((pooled / safe).clamp_max(1) + lift[:, rank] * (px > 0)).clamp_max(1)
            tried = family.present[:, rank] & (qx > 0) & (pick < 0)
            after, left_over = after_reject(p, q, x[:, 0], tried[:, None])
            bias = step_bias(x, keep, after, exact, after)
            dear = bias > family.slack - spent
            keep = torch.where(dear, exact, keep)
            stays, margin = toss(family.u[:, rank], keep, tried, margin)
            pick = torch.where(stays, rank, pick)
            spent = torch.where(tried & ~dear, spent + bias, spent)
            failed = (tried & ~stays)[:, None]
            p = torch.where(failed, after, p)
            q = q if q is None or left_over is None else torch.where(failed, left_over, q)
        return Judgement(pick, p, spent, margin)

    def _greedy(self, family: Family, pool: Tensor, lift: Tensor) -> Judgement:
        own = family.p.gather(1, family.tokens)
        pooled = (own[:, None] * pool).sum(2).clamp_max(1)
        return greedy_choice(family, (pooled + lift * (own > 0)).clamp_max(1))
