"""What a drafter proposes (a chain or a tree of tokens per image) and the verdict on it, for codes and for vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bozzetto.drafts.tree import Tree, chain_tree
from bozzetto.laws.chain import ChainLaw, Trajectory


@dataclass
class Draft:
    """tokens: codes int64 [B, M] or vectors float32 [B, M, D], drafted nodes (M may be 0).

    tree: how they hang together; None is a chain over the M positions after the committed ones (vectors: always).
    log_q: float32 [B, I, V], log-laws the codes were drawn from (after guidance, temperature, top-k, top-p), row
    tree.row[n] for the children of node n (for a chain row i is the law of token i); children are draws without
    replacement in the order of their ranks. None when the drafter keeps no laws.
    certain: the tokens are a function of what is committed and of the model, so that their draft law is a point mass.
    hidden: [B, M + 1, d], the drafter's own hidden state at every node, where the rule asks for it.
    window: what the places behind the first refused token would have been is the next draft, so that it is wanted.
    beside: of a window, how many of its first places have second guesses, branches of `reach` tokens. These are the
    last nodes, level by level (tree: a comb), and log_q has a row for every node.
    margin: float32 [B], how far the draws of this draft were from other ends, in log-probability (None: not measured).
    trajectory: of vectors, their denoising trajectories [B, M, ...] with the draft's laws of every step, where the rule
    asks for them; law: the draft's laws at its B M places, to score other trajectories with.
    """

    tokens: Tensor
    log_q: Tensor | None = None
    tree: Tree | None = None
    certain: bool = False
    hidden: Tensor | None = None
    window: bool = False
    beside: int = 0
    reach: int = 1
    margin: Tensor | None = None
    trajectory: Trajectory | None = None
    law: ChainLaw | None = None

    @property
    def length(self) -> int:
        """Drafted nodes, M."""
        return self.tokens.shape[1]

    @property
    def chain(self) -> int:
        """Nodes of a chain, or of a comb without its branches."""
        return self.length - self.beside * self.reach

    @property
    def depth(self) -> int:
        """Most drafts that one pass can accept."""
        return self.length if self.tree is None else self.tree.max_depth

    def shape(self) -> Tree:
        """The tree of any draft."""
        return chain_tree(self.length, self.tokens.device) if self.tree is None else self.tree


@dataclass
class Verdict:
    """tokens: int64 [B, D + 1], or vectors float32 [B, M + 1, D], along the accepted path: the first `accepted` are
    drafts, the next one is the rule's own; on a chain or comb what follows is a suggestion for later drafts (from rules
    with `window`), on a tree it means nothing. accepted: int64 [B].

    path: int64 [B, D + 1], scored index of each place on the path (0: root; repeats its last node), None on a chain.
    spent: float32 [B], bound of the bias of this pass, from rules that are not exact. margin: float32 [B, K], how far
    the coins and draws of this pass were from falling otherwise, in log-probability, those of the k-th place behind
    what is committed in column k (None: the rule throws none).
    trajectory: [B, M + 1, ...], the target's own at every place, from rules for vectors with `window`; distance:
    float32 [B, M + 1], how far each vector is from the target's own sample with the same noise, where that is measured.
    """

    tokens: Tensor
    accepted: Tensor
    path: Tensor | None = None
    spent: Tensor | None = None
    margin: Tensor | None = None
    trajectory: Trajectory | None = None
    distance: Tensor | None = None

    def keep(self, rows: Tensor) -> Verdict:
        """What later drafts are made from, of the given batch rows int64 [B']."""
        trajectory = None if self.trajectory is None else Trajectory(*(part[rows] for part in self.trajectory))
        return Verdict(self.tokens[rows], self.accepted[rows], trajectory=trajectory)

    def join(self, other: Verdict) -> Verdict:
        """The same with another batch's images behind; columns that one has not are zeros."""
        trajectory = None
        if self.trajectory is not None and other.trajectory is not None:
            trajectory = Trajectory(*map(joined, self.trajectory, other.trajectory))
        accepted = torch.cat([self.accepted, other.accepted])
        return Verdict(joined(self.tokens, other.tokens), accepted, trajectory=trajectory)


def joined(one: Tensor, other: Tensor) -> Tensor:
    """[B, W, ...] and [B', W', ...], filled up with zeros -> [B + B', max(W, W'), ...]."""
    width = max(one.shape[1], other.shape[1])
    return torch.cat([F.pad(p, (*[0, 0] * (p.dim() - 2), 0, width - p.shape[1])) for p in (one, other)])
