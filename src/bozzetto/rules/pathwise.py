"""Pathwise: keep a drafted token that is within epsilon of the target's own sample from the same noise.

The target's chains at all places of a window are run with the noise of the sequential sampler, in one batch. A draft is
kept while each of its D numbers is within epsilon of the target's own; at the first that is not, the target's own token
is taken and the drafts after it are dropped. So every committed token is within epsilon of what the target itself would
have drawn from the same noise and the same committed context; epsilon = 0 is the sequential image of the seed. (The
coupling is by common random numbers; the test with its bound is this project's own.)

A token that is within epsilon goes on as context, so that small distances of a run of kept tokens act together. The
stricter `over=run` bounds them together: all distances of the numbers of a run add up to at most epsilon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from bozzetto.drafts import VECTORS, Draft, Verdict
from bozzetto.errors import require
from bozzetto.laws.chain import ChainLaw, sample_trajectory
from bozzetto.rules.base import Noise, Rule, given, leading


@dataclass(frozen=True)
class Pathwise(Rule):
    """epsilon: largest distance, in units of the tokens' deviation. over: `token`, in any of the D numbers of a token;
    `run`, of all numbers of all tokens kept in a pass together, the sum of their distances."""

    name: ClassVar[str] = "pathwise"
    about: ClassVar[str] = (
        "Keeps a token that lies within epsilon of what the same noise gives sequentially: pictures change "
        "by no more than that."
    )
    tokens: ClassVar[str] = VECTORS
    needs_law: ClassVar[bool] = False
    fixed_noise: ClassVar[bool] = True
    needs_fixed: ClassVar[bool] = True
    needs_uniforms: ClassVar[bool] = False
    window: ClassVar[bool] = True
    ragged: ClassVar[bool] = True
    masked: ClassVar[bool] = True
    widest: ClassVar[int] = 32
    bias: ClassVar[str] = "every number of a token is within epsilon of the target's own sample from the same noise"

    epsilon: float = 0.1
    over: str = "token"

    def __post_init__(self) -> None:
        require(self.over in ("token", "run"), "over", self.over, "token, run")
        require(0 <= self.epsilon < float("inf"), "epsilon", self.epsilon, "a number >= 0")

    def verify(self, draft: Draft, law: ChainLaw, noise: Noise) -> Verdict:
        batch, length = draft.tokens.shape[:2]
        fixed = given(noise.fixed, self, "fixed noise")
        own = sample_trajectory(law, None, fixed.flatten(0, 1)).token.unflatten(0, (batch, length + 1))
        gap = own[:, :length] - draft.tokens
        apart = gap.abs().amax(-1)  # [B, M]
        tested = apart if self.over == "token" else gap.abs().sum(-1).cumsum(1)
        accepted = leading(tested <= self.epsilon)
        kept = torch.arange(length, device=own.device) < accepted[:, None]
        tokens = torch.cat([torch.where(kept[..., None], draft.tokens, own[:, :length]), own[:, length:]], 1)
        distance = torch.nn.functional.pad(apart.masked_fill(~kept, 0.0), (0, 1))
        return Verdict(tokens, accepted, distance=distance)
