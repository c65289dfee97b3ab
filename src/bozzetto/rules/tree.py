"""Recursive rejection sampling on a tree whose siblings are drawn without replacement; lossless.

With the laws P = p and Q = q, each child x in draw order is kept with probability min(1, P(x)/Q(x)); else
P <- norm([P - Q]+) and Q <- Q without x. When all children fail, the token is drawn from P (SpecInfer, arXiv
2305.09781; EAGLE, arXiv 2401.15077; without replacement: RSD, arXiv 2402.14160). For certain drafts Q is a point mass
on each child in turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bozzetto.drafts import Draft, Verdict
from bozzetto.rules.base import Noise, Rule
from bozzetto.rules.walk import Family, Judgement, no_coin, nobody, normalised, toss, walk, without


@dataclass(frozen=True)
class TreeRejection(Rule):
    """Rejection sibling by sibling, level by level."""

    name: ClassVar[str] = "tree"
    exact: ClassVar[bool] = True

    def verify(self, draft: Draft, log_p: Tensor, noise: Noise) -> Verdict:
        return walk(draft, log_p, noise, judge)


def judge(family: Family) -> Judgement:
    """The rule at one node."""
    p, q = family.p, family.q
    pick, margin = torch.full_like(family.node, -1), no_coin(family)
    for rank in range(family.tokens.shape[1]):
        if nobody(family.present[:, rank] & (pick < 0)):
            break
        x = family.tokens[:, rank, None]
        px = p.gather(1, x)[:, 0]
        qx = torch.ones_like(px) if q is None else q.gather(1, x)[:, 0]
        tried = family.present[:, rank] & (qx > 0) & (pick < 0)
        keep, margin = toss(family.u[:, rank] * qx, px, tried, margin)
        pick = torch.where(keep, rank, pick)
        failed = (tried & ~keep)[:, None]
        p, q = after_reject(p, q, x[:, 0], failed)
    return Judgement(pick, p, torch.zeros_like(family.slack), margin)


def after_reject(p: Tensor, q: Tensor | None, x: Tensor, failed: Tensor) -> tuple[Tensor, Tensor | None]:
    """(P, Q) after child x int64 [B] was refused, in the rows where failed bool [B, 1]."""
    taken = p.scatter(1, x[:, None], 0.0) if q is None else (p - q).clamp_min(0)
    p = torch.where(failed, normalised(taken, p), p)
    return p, q if q is None else torch.where(failed, without(q, x), q)
