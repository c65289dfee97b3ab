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
from bozzetto.rules.base import Noise, Rule, given, leading
from bozzetto.runtime.laws import gumbel_draw


@dataclass(frozen=True)
class SeedExact(Rule):
    """Keep what sequential decoding of the same seed would have drawn; lossless to the byte."""

    name: ClassVar[str] = "seed-exact"
    about: ClassVar[str] = (
        "Keeps a draft where it is what the seed's own noise makes of the model's law: the picture of "
        "sequential decoding, byte for byte."
    )
    exact: ClassVar[bool] = True
    seed_exact: ClassVar[bool] = True
    fixed_noise: ClassVar[bool] = True
    sequential: ClassVar[bool] = True
    fused: ClassVar[bool] = True
    needs_law: ClassVar[bool] = False
    needs_fixed: ClassVar[bool] = True
    needs_uniforms: ClassVar[bool] = False
    window: ClassVar[bool] = True
    beside: ClassVar[bool] = True

    def verify(self, draft: Draft, log_p: Tensor, noise: Noise) -> Verdict:
        tokens, margin = gumbel_draw(log_p, given(noise.fixed, self, "the positions' Gumbel noise"))
        found = Verdict(tokens, margin=margin, accepted=leading(tokens[:, : draft.length] == draft.tokens))
        if draft.tree is not None:
            found = _follow(draft.tree, draft.tokens, tokens, margin)
        # Places behind what is kept are drawn again.
        behind = torch.arange(found.tokens.shape[1], device=tokens.device) > found.accepted[:, None]
        assert found.margin is not None
        found.margin = found.margin.masked_fill(behind, torch.inf)
        return _carried(draft, tokens, found) if draft.beside else found


def _carried(draft: Draft, wanted: Tensor, found: Verdict) -> Verdict:
    """The verdict on a comb with the window's tokens behind what is accepted. wanted: int64 [B, M + 1]."""
    level = torch.arange(found.tokens.shape[1], device=wanted.device)
    window = torch.nn.functional.pad(wanted[:, : draft.chain + 1], (0, len(level) - draft.chain - 1))
    tokens = torch.where(level <= found.accepted[:, None], found.tokens, window)
    return Verdict(tokens, found.accepted, found.path, margin=found.margin)


def _follow(tree: Tree, drafted: Tensor, wanted: Tensor, margin: Tensor) -> Verdict:
    """drafted: int64 [B, M]; wanted: int64 [B, M + 1], the target's token after the root and after every node; margin:
    float32 [B, M + 1], of these."""
    batch = len(drafted)
    refused = drafted != wanted.gather(1, tree.parent.expand(batch, -1))
    refused = torch.nn.functional.pad(refused, (1, 0))  # the root is always there
    reached = ~(tree.sees & refused[:, None]).any(-1)  # neither the node nor an ancestor was refused
    last = torch.where(reached, tree.depth, -1).argmax(1)
    path = tree.path.expand(batch, -1, -1)[torch.arange(batch, device=last.device), last]
    depth = tree.depth.expand(batch, -1).gather(1, last[:, None])[:, 0]
    return Verdict(wanted.gather(1, path), depth, path, margin=margin.gather(1, path))
