"""Relaxed rules that give every token a probability of being kept: grouped (GSD) and annealed (COOL-SD); lossy.

For a child x drawn from q with keeping probabilities a(v) and a law r after a reject, the token's law is

    out = q a + (1 - sum q a) r,      bias = TV(out, p)

which is computed at every decision: it is the exact bias of a node with one child, given what was drafted before it.
Where it would exceed what is left of an image's budget, the exact rule decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bozzetto.drafts import Draft, Verdict
from bozzetto.errors import require
from bozzetto.rules.base import Noise, Rule
from bozzetto.rules.own import ANNEALED, GROUPED
from bozzetto.rules.walk import Child, Children, Judgement, greedy_choice, normalised, siblings, walk

_MOST = 1 << 20  # codes in a group: no model has more


class KeepingRule(Rule):
    """A rule given by a(v); subclasses define `keeping` and `rejected`."""

    window: ClassVar[bool] = True

    def keeping(self, p: Tensor, q: Tensor, depth: int) -> Tensor:
        """a [B, V] in [0, 1] at a node with laws p, q [B, V]; depth: of the child, from 1."""
        raise NotImplementedError

    def rejected(self, p: Tensor, q: Tensor, keep: Tensor) -> Tensor:
        """Unnormalised law [B, V] after a reject."""
        raise NotImplementedError

    def kernel(self) -> tuple[float, ...] | None:
        """What our kernels are told (rules/own.py)."""
        return None

    def verify(self, draft: Draft, log_p: Tensor, noise: Noise) -> Verdict:
        kernel = None if noise.greedy else self.kernel()
        return walk(draft, log_p, noise, self._greedy if noise.greedy else self._judge, kernel)

    def decide(self, p: Tensor, q: Tensor, depth: int, slack: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keeping probabilities and law after a reject [B, V], and the bias [B] that they cost."""
        exact = torch.where(q > 0, p / q.clamp_min(torch.finfo(q.dtype).tiny), 1.0).clamp_max(1)
        plain = normalised((p - q).clamp_min(0), p)
        keep = self.keeping(p, q, depth)
        rest = normalised(self.rejected(p, q, keep), plain)
        kept = q * keep
        bias = (kept + (1 - kept.sum(-1, keepdim=True)).clamp_min(0) * rest - p).abs().sum(-1) / 2
        dear = (bias > slack)[:, None]
        keep, rest = torch.where(dear, exact, keep), torch.where(dear, plain, rest)
        return keep, rest, torch.where(dear[:, 0], 0.0, bias)

    def _judge(self, family: Children) -> Judgement:
        def decide(child: Child) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            q = torch.zeros_like(child.p).scatter_(1, child.x, 1.0) if child.q is None else child.q
            keep, rest, bias = self.decide(child.p, q, family.depth, child.left)
            return child.u, keep.gather(1, child.x)[:, 0], rest, bias

        return siblings(family, decide)

    def _greedy(self, family: Children) -> Judgement:
        """a(x) of every child as if it had been certain."""
        keep = []
        for x in family.tokens[..., None].unbind(1):
            point = torch.zeros_like(family.p).scatter_(1, x, 1.0)
            keep.append(self.keeping(family.p, point, family.depth).gather(1, x)[:, 0])
        return greedy_choice(family, torch.stack(keep, 1))


@dataclass(frozen=True)
class Grouped(KeepingRule):
    """GSD (arXiv 2508.07747): a token is kept for its group, min(1, p(C(x)) / q(C(x))), where C(x) holds the `group`
    tokens whose rank by target probability is closest to its own; a reject draws from norm([p - q]+)."""

    group: int = 8

    name: ClassVar[str] = "grouped"
    about: ClassVar[str] = (
        "Keeps a guess for the codes that are about as likely as it: more is kept, and pictures change."
    )
    bias: ClassVar[str] = "the exact bias of every decision; without a bound of its own"

    def __post_init__(self) -> None:
        require(1 <= self.group <= _MOST, "group", self.group, f"a whole number from 1 to {_MOST}")

    def kernel(self) -> tuple[float, ...] | None:
        return GROUPED, self.group

    def keeping(self, p: Tensor, q: Tensor, depth: int) -> Tensor:
        vocab, below = p.shape[1], self.group // 2
        order = p.argsort(dim=1, descending=True, stable=True)
        at = torch.arange(vocab, device=p.device)
        first, last = (at - below).clamp_min(0), (at - below + self.group - 1).clamp_max(vocab - 1)

        def windows(law: Tensor) -> Tensor:
            total = torch.nn.functional.pad(law.gather(1, order).double().cumsum(1), (1, 0))
            return total[:, last + 1] - total[:, first]

        mass_p, mass_q = windows(p), windows(q)
        ratio = torch.where(mass_q > 0, mass_p / mass_q.clamp_min(1e-300), 1.0).clamp(0, 1)
        # Outside the support of p nothing is kept, whatever the group.
        return torch.zeros_like(p).scatter_(1, order, ratio.to(p.dtype)) * (p > 0)

    def rejected(self, p: Tensor, q: Tensor, keep: Tensor) -> Tensor:
        return (p - q).clamp_min(0)


@dataclass(frozen=True)
class Annealed(KeepingRule):
    """COOL-SD (arXiv 2601.09212): min(1, w_i p / q) with w_i = delta exp(-nu i - mu) at draft i = 0, 1, ..., loose
    early and strict late, never below 1 (the exact rule); a reject draws from norm([p - q a]+), which makes the bias of
    a decision sum [q a - p]+, the least possible. `delta` of the paper is a factor here, 1 or more."""

    delta: float = 2.0
    nu: float = 0.7
    mu: float = 0.0

    name: ClassVar[str] = "annealed"
    about: ClassVar[str] = (
        "Is generous with the first guess of a chain and strict with later ones: more is kept, and pictures change."
    )
    bias: ClassVar[str] = "the exact bias of every decision, sum [min(q, w p) - p]+"

    def __post_init__(self) -> None:
        require(1 <= self.delta < math.inf, "delta", self.delta, "a number >= 1")
        require(0 <= self.nu < math.inf, "nu", self.nu, "a number >= 0")
        require(math.isfinite(self.mu), "mu", self.mu, "a number")

    def kernel(self) -> tuple[float, ...] | None:
        return ANNEALED, 0, self.delta, 0.0, self.nu, self.mu

    def keeping(self, p: Tensor, q: Tensor, depth: int) -> Tensor:
        factor = max(1.0, self.delta * math.exp(-self.nu * (depth - 1) - self.mu))
        return torch.where(q > 0, factor * p / q.clamp_min(torch.finfo(q.dtype).tiny), 1.0).clamp_max(1)

    def rejected(self, p: Tensor, q: Tensor, keep: Tensor) -> Tensor:
        return (p - q * keep).clamp_min(0)
