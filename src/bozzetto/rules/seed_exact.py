"""Seed-exact verification: accept a draft iff it is the very token that sequential Gumbel-max sampling would draw.

With fixed Gumbel noise G_k per position, the sequential sampler emits argmax(log p_k + G_k). A draft is kept iff it
equals that argmax, so the output is the sequential output of the same seed, whatever the drafter (DISD, arXiv
2408.07978, after the Gumbel coupling of SCD, arXiv 2510.24211).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bozzetto.drafts import Draft, Verdict
from bozzetto.laws.categorical import gumbel_argmax
from bozzetto.rules.base import RuleNoise, leading


@dataclass(frozen=True)
class SeedExact:
    """Keep what sequential decoding of the same seed would have drawn; lossless to the byte."""

    name: str = "seed-exact"
    exact: bool = True
    seed_exact: bool = True
    needs_law: bool = False
    needs_uniforms: bool = False

    def verify(self, draft: Draft, log_p: Tensor, noise: RuleNoise) -> Verdict:
        tokens = gumbel_argmax(log_p, noise.gumbel)
        return Verdict(tokens, leading(tokens[:, : draft.length] == draft.tokens))
