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
from bozzetto.rules.own import TREE
from bozzetto.rules.walk import Child, exact_rest, siblings, walk


@dataclass(frozen=True)
class TreeRejection(Rule):
    """Rejection sibling by sibling, level by level."""

    name: ClassVar[str] = "tree"
    about: ClassVar[str] = "Tries the guesses for a place one after the other, level by level; the model's own law."
    exact: ClassVar[bool] = True

    def verify(self, draft: Draft, log_p: Tensor, noise: Noise) -> Verdict:
        return walk(draft, log_p, noise, lambda family: siblings(family, self._decide), (TREE,))

    def _decide(self, child: Child) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return child.u * child.qx, child.px, exact_rest(child), torch.zeros_like(child.left)
