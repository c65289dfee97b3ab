"""Traversal verification: a drafted tree is read from its leaves up, whole paths at a time; lossless.

Every node n has a weight w(n), 1 at the root, and its children are drawn without replacement from Q. A child x starts
with w(x) = min(1, w(n) P(x) / Q(x)). Nodes are visited in post-order; a visited node is accepted, with the path to it,
with probability w. If it is refused, its parent takes

    S = sum [w(n) P - Q]+,   P <- norm([w(n) P - Q]+),   w(n) <- S / (S + 1 - w(n)),   Q <- Q without x

before the next child starts. An accepted node draws the token after it from its P (arXiv 2505.12398). On a chain this
is block verification (arXiv 2403.10444), which no verifier of a single chain can beat.

As long as everything before it in post-order was refused, the state at a node depends on no coin. So the weights of all
nodes are found first, level by level, and then the first accepted node is looked up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from bozzetto.drafts import Draft, Verdict
from bozzetto.laws.categorical import coin_margin, weighted_draw
from bozzetto.rules.base import Noise, Rule
from bozzetto.rules.own import TRAVERSAL, own_verdict
from bozzetto.rules.walk import normalised


@dataclass(frozen=True)
class Traversal(Rule):
    """Leaves first; trees and chains."""

    name: ClassVar[str] = "traversal"
    about: ClassVar[str] = (
        "Goes through a tree of guesses from the leaves up and keeps more than level by level; the model's own law."
    )
    exact: ClassVar[bool] = True

    def verify(self, draft: Draft, log_p: Tensor, noise: Noise) -> Verdict:
        if noise.uniforms is None or (draft.length and draft.log_q is None and not draft.certain):
            raise ValueError(f"rule {self.name!r} needs fresh uniforms and the draft's law")
        batch, device = len(log_p), log_p.device
        rows = torch.arange(batch, device=device)
        if draft.length == 0:
            own, margin = weighted_draw(log_p[:, 0].exp(), noise.uniforms[:, 0, 1])
            return Verdict(own[:, None], torch.zeros_like(own), margin=margin[:, None])
        if noise.own:
            found = own_verdict(draft, log_p, noise, TRAVERSAL)
            return replace(found, spent=None, margin=found.margin if found.margin is None else found.margin[:, :1])
        tree = draft.shape()
        weight, rest = _weights(draft, log_p)
        accepted = noise.uniforms[..., 0] < weight
        accepted[:, 0] = True  # the root
        order = tree.order.expand(batch, -1)
        node = torch.where(accepted, order, torch.iinfo(torch.int64).max).argmin(1)
        own, margin = weighted_draw(rest[rows, node], noise.uniforms[rows, node, 1])
        # Coins of the nodes that were visited; a node that an image's tree lacks has none.
        coins = coin_margin(noise.uniforms[..., 0], weight.log())[:, 1:]
        coins = coins.masked_fill(order[:, 1:] > order[rows, node][:, None], torch.inf)
        margin = torch.minimum(margin, coins.amin(1))[:, None]
        path = tree.path.expand(batch, -1, -1)[rows, node]
        depth = tree.depth.expand(batch, -1)[rows, node]
        tokens = torch.nn.functional.pad(draft.tokens, (1, 0)).gather(1, path)
        out = torch.nn.functional.pad(tokens[:, 1:], (0, 1)).scatter(1, depth[:, None], own[:, None])
        return Verdict(out, depth, None if draft.tree is None else path, margin=margin)


@dataclass(frozen=True)
class BlockVerification(Traversal):
    """Block verification of a chain: how far to go is decided for the chain as a whole."""

    name: ClassVar[str] = "block"
    about: ClassVar[str] = (
        "Decides for a chain of guesses as a whole and keeps more than guess by guess; the model's own law."
    )
    trees: ClassVar[bool] = False
    ragged: ClassVar[bool] = True

    def verify(self, draft: Draft, log_p: Tensor, noise: Noise) -> Verdict:
        if draft.tree is not None and max(draft.tree.widths) > 1:
            raise ValueError("rule 'block' needs a chain")
        return super().verify(draft, log_p, noise)


def _weights(draft: Draft, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Acceptance probability [B, M + 1] of every node given that all before it were refused, and the law [B, M + 1, V]
    that an accepted node draws from."""
    tree, batch = draft.shape(), len(log_p)
    rows = torch.arange(batch, device=log_p.device)[:, None]
    tokens = torch.nn.functional.pad(draft.tokens, (1, 0))
    child, row = (part.expand(batch, *part.shape[1:]) for part in (tree.child, tree.row))
    # One row more than nodes: families that do not exist work there.
    weight = torch.zeros(batch, tree.nodes + 2, dtype=torch.float64, device=log_p.device)
    weight[:, 0] = 1  # nodes that an image's tree lacks keep their zero
    rest = torch.nn.functional.pad(log_p.exp(), (0, 0, 0, 1))
    for mothers, width in zip(tree.families, tree.widths, strict=True):
        mothers = mothers.expand(batch, -1)
        p, w = rest[rows, mothers], weight.gather(1, mothers)  # [B, I, V], [B, I]
        q = None
        if draft.log_q is not None and not draft.certain:
            q = draft.log_q[rows, row.gather(1, mothers.clamp_max(tree.nodes))].exp()
        for rank in range(width):
            kid = child[rows, mothers][..., rank]  # [B, I]
            x = tokens.gather(1, kid)[..., None]
            px, qx = p.gather(2, x)[..., 0], torch.ones_like(w) if q is None else q.gather(2, x)[..., 0]
            real = (kid > 0) & (qx > 0)
            started = torch.where(real, (w * px / qx.clamp_min(1e-38)).clamp_max(1), 0.0)
            # Those without a child here write to the spare row.
            weight = weight.scatter(1, torch.where(kid > 0, kid, tree.nodes + 1), started)
            q_now = torch.zeros_like(p).scatter_(2, x, 1.0) if q is None else q
            excess = (w.to(p.dtype)[..., None] * p - q_now).clamp_min(0)
            s = excess.sum(-1).double()
            p = torch.where(real[..., None], normalised(excess, p), p)
            lost = s + 1 - w
            w = torch.where(real, torch.where(lost > 0, s / lost.clamp_min(1e-38), 1.0), w)
            if q is not None:
                less = q.scatter(2, x, 0.0)
                less = less / less.sum(-1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
                q = torch.where(real[..., None], less, q)
        rest = rest.scatter(1, mothers[..., None].expand_as(p), p)
        weight = weight.scatter(1, mothers, w)
    return weight[:, :-1], rest[:, :-1]
