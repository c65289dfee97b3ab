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
from bozzetto.errors import require
from bozzetto.rules.base import Noise, Rule, given
from bozzetto.rules.own import CASCADE
from bozzetto.rules.walk import Child, Children, Judgement, exact_rest, greedy_choice, siblings, step_bias, walk


@dataclass(frozen=True)
class Cascade(Rule):
    """alike, converged: cosines in [-1, 1]; kl: nats; raise_by: in [0, 1] (0: breadth only)."""

    alike: float = 0.9
    converged: float = 0.6
    kl: float = 3.0
    raise_by: float = 0.1

    name: ClassVar[str] = "cascade"
    about: ClassVar[str] = "Pools guesses that the drafter itself finds alike: more is kept, and pictures change."
    needs_hidden: ClassVar[bool] = True
    bias: ClassVar[str] = "each decision's distance from the exact one; without a bound of its own"

    def __post_init__(self) -> None:
        for name in ("alike", "converged"):
            require(-1 <= getattr(self, name) <= 1, name, getattr(self, name), "a number from -1 to 1")
        require(self.kl >= 0, "kl", self.kl, "a number >= 0")
        require(0 <= self.raise_by <= 1, "raise_by", self.raise_by, "a number from 0 to 1")

    def verify(self, draft: Draft, log_p: Tensor, noise: Noise) -> Verdict:
        hidden = draft.hidden
        if draft.tree is None:  # a lone child has no siblings to be alike
            hidden = log_p[..., :1]
        hidden = given(hidden, self, "the drafter's hidden states")
        states = F.normalize(hidden.float(), dim=-1)  # without drafts nobody asks for them

        def judge(family: Children) -> Judgement:
            rows = torch.arange(len(log_p), device=log_p.device)[:, None]
            own = states[rows, family.kids]  # [B, C, d]
            pool = own @ own.transpose(1, 2) > self.alike
            pool = pool & family.present[:, None] | torch.eye(own.shape[1], dtype=torch.bool, device=own.device)
            lift = self._lift(log_p[rows, family.node[:, None]], log_p[rows, family.kids])
            if noise.greedy:
                return self._greedy(family, pool, lift)
            return siblings(family, lambda c: self._decide(c, family.tokens, pool[:, c.rank], lift[:, c.rank]))

        kernel = None if noise.greedy else (CASCADE, 0, self.alike, self.converged, self.kl, self.raise_by)
        return walk(draft, log_p, noise, judge, kernel)

    def _lift(self, parent: Tensor, child: Tensor) -> Tensor:
        """What convergence adds to the keeping probability, [B, C]; parent [B, 1, V], child [B, C, V] log-laws."""
        a, b = (law.clamp_min(-30) for law in (parent, child))
        a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
        cosine = F.cosine_similarity(a, b, dim=-1)
        divergence = (parent.exp() * (parent.clamp_min(-30) - child.clamp_min(-30))).sum(-1)
        return torch.where((cosine > self.converged) & (divergence < self.kl), self.raise_by * cosine, 0.0)

    def _decide(
        self, child: Child, tokens: Tensor, pool: Tensor, lift: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """tokens: int64 [B, C], of all siblings; pool: bool [B, C], who counts for the child; lift: float [B]."""
        safe = child.qx.clamp_min(torch.finfo(child.px.dtype).tiny)
        pooled = (child.p.gather(1, tokens) * pool).sum(1)
        exact, after = (child.px / safe).clamp_max(1), exact_rest(child)
        keep = ((pooled / safe).clamp_max(1) + lift * (child.px > 0)).clamp_max(1)
        bias = step_bias(child.x, keep, after, exact, after)
        dear = bias > child.left
        return child.u, torch.where(dear, exact, keep), after, torch.where(dear, 0.0, bias)

    def _greedy(self, family: Children, pool: Tensor, lift: Tensor) -> Judgement:
        own = family.p.gather(1, family.tokens)
        pooled = (own[:, None] * pool).sum(2).clamp_max(1)
        return greedy_choice(family, (pooled + lift * (own > 0)).clamp_max(1))
