"""Seed-exact verification: accept a draft iff it is the very token that sequential Gumbel-max sampling would draw.

With fixed Gumbel noise G_k per position, the sequential sampler emits argmax(log p_k + G_k). A draft is kept iff it
equals that argmax, so the output is the sequential output of the same seed, whatever the drafter (DISD, arXiv
2408.07978, after the Gumbel coupling of SCD, arXiv 2510.24211). On a tree the child that equals its parent's argmax is
followed; there is at most one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bozzetto.drafts import Draft, Tree, Verdict
from bozzetto.laws.categorical import gumbel_argmax
from bozzetto.rules.base import Rule, RuleNoise, leading
from bozzetto.rules.exact import way_through_comb


@dataclass(frozen=True)
class SeedExact(Rule):
    """Keep what sequential decoding of the same seed would have drawn; lossless to the byte."""

    name: ClassVar[str] = "seed-exact"
    exact: ClassVar[bool] = True
    seed_exact: ClassVar[bool] = True
    needs_law: ClassVar[bool] = False
    needs_gumbel: ClassVar[bool] = True
    needs_uniforms: ClassVar[bool] = False
    window: ClassVar[bool] = True
    beside: ClassVar[bool] = True

    def verify(self, draft: Draft, log_p: Tensor, noise: RuleNoise) -> Verdict:
        if noise.gumbel is None:
            raise ValueError("rule 'seed-exact' needs the positions' Gumbel noise")
        tokens = gumbel_argmax(log_p, noise.gumbel)
        if draft.beside:
            return _comb(draft, tokens)
        if draft.tree is not None:
            return _follow(draft.tree, draft.tokens, tokens)
        return Verdict(tokens, leading(tokens[:, : draft.length] == draft.tokens))


def _comb(draft: Draft, wanted: Tensor) -> Verdict:
    """wanted: int64 [B, M + 1]. Where the window's first refused token has the right one beside it, the token behind
    that is known too."""
    chain, count = draft.length - draft.beside, draft.beside
    accepted = leading(wanted[:, :chain] == draft.tokens[:, :chain])
    at = accepted[:, None].clamp_max(count - 1)
    right = (wanted[:, :count] == draft.tokens[:, chain:]).gather(1, at)[:, 0]
    onto = (accepted < count) & right
    bonus = wanted.gather(1, chain + 1 + at)
    behind = torch.where(onto[:, None], at + 1, chain + 1)
    padded = torch.nn.functional.pad(wanted[:, : chain + 1], (0, 1))
    return Verdict(padded.scatter(1, behind, bonus)[:, :-1], accepted + onto, way_through_comb(accepted, onto, chain))


def _follow(tree: Tree, drafted: Tensor, wanted: Tensor) -> Verdict:
    """drafted: int64 [B, M]; wanted: int64 [B, M + 1], the target's token after the root and after every node."""
    batch = len(drafted)
    refused = drafted != wanted.gather(1, tree.parent.expand(batch, -1))
    refused = torch.nn.functional.pad(refused, (1, 0))  # the root is always there
    reached = ~(tree.sees & refused[:, None]).any(-1)  # neither the node nor an ancestor was refused
    last = torch.where(reached, tree.depth, -1).argmax(1)
    path = tree.path.expand(batch, -1, -1)[torch.arange(batch, device=last.device), last]
    return Verdict(wanted.gather(1, path), tree.depth.expand(batch, -1).gather(1, last[:, None])[:, 0], path)
