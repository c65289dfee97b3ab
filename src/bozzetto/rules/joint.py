"""Joint verification: one speculative test for the whole denoising path of a token. Exact.

A token's path Y = (states 0..T) is an auxiliary variable with law p under the target's head and q under the draft's.
The drafted path is kept with probability min(1, p(Y) / q(Y)), the product of the ratios of its T steps; otherwise a
path of law norm([p - q]+) takes its place (speculative sampling, Leviathan et al., arXiv 2211.17192, on path space).
Either way the path has law p, hence its last state the law of the target's token, and later tokens depend on nothing
else of it. No test of a whole path keeps more often: 1 - TV(p, q).

The residual is sampled by trial: a new path of the target survives with probability (1 - q(Y) / p(Y))_+, for which the
draft's head scores it in one call. A token needs one trial on average, whatever the draft is worth.

A sampler whose last step adds no noise makes the two laws mutually singular: then nothing is accepted unless the last
means agree to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bozzetto.drafts import VECTORS, Draft, Verdict
from bozzetto.errors import UsageError, require
from bozzetto.laws.chain import ChainLaw, Gaussian, log_ratio, sample_trajectory, score_trajectory
from bozzetto.laws.noise import fold, fresh_noise, uniform
from bozzetto.rules.base import Noise, Rule, given, leading

_LARGEST_GROUP = 1024  # trials of one image that are run at once
_MOST_TRIALS = 2**17  # rejections that need more have a probability below 3e-6, whatever the laws


@dataclass(frozen=True)
class Joint(Rule):
    """tries: target paths that are run at once for an image whose draft was rejected; the first to survive is taken, so
    that the result does not depend on it. Serial head calls cost more than rows: a few more than are needed pay."""

    name: ClassVar[str] = "joint"
    about: ClassVar[str] = "Keeps a token for its whole denoising path, not step by step; the model's own law."
    tokens: ClassVar[str] = VECTORS
    exact: ClassVar[bool] = True

    tries: int = 8

    def __post_init__(self) -> None:
        require(1 <= self.tries <= _LARGEST_GROUP, "tries", self.tries, f"a whole number from 1 to {_LARGEST_GROUP}")

    def verify(self, draft: Draft, law: ChainLaw, noise: Noise) -> Verdict:
        (batch, length), keys = draft.tokens.shape[:2], given(noise.keys, self, "fresh keys")
        if length:
            log_u = uniform(fold(keys[:, :length], 0)).log()
            accepted = leading(log_u < self.score(draft, law))
        else:
            accepted = torch.zeros(batch, dtype=torch.int64, device=keys.device)
        own = self._own(draft, law, keys, accepted)
        tokens = torch.cat([draft.tokens, own[:, None]], 1)
        tokens[torch.arange(batch, device=own.device), accepted] = own
        return Verdict(tokens, accepted)

    def score(self, draft: Draft, law: ChainLaw) -> Tensor:
        """log p(Y) / q(Y) of every drafted path, float64 [B, M]: ONE call of the target's head."""
        path = given(draft.trajectory, self, "the drafts' paths")
        batch, length = draft.tokens.shape[:2]
        rows = torch.arange(batch, device=draft.tokens.device)[:, None] * (length + 1)
        place = (rows + torch.arange(length, device=rows.device)).flatten()
        states = path.states.flatten(0, 1)
        drafted = Gaussian(path.mean.flatten(0, 1), path.std.flatten(0, 1))
        steps = log_ratio(states[:, 1:], score_trajectory(law, place, states), drafted)
        return steps.sum(-1).unflatten(0, (batch, length))

    def _own(self, draft: Draft, law: ChainLaw, keys: Tensor, accepted: Tensor) -> Tensor:
        """The rule's own tokens [B, D]: of the residual at the first rejected place, of the target after the last."""
        batch, length = draft.tokens.shape[:2]
        rejected = accepted < length
        key = fold(keys.gather(1, accepted[:, None])[:, 0], 1)
        out = torch.empty(batch, law.dim, device=keys.device)
        left = torch.arange(batch, device=keys.device)
        size, before = self.tries, 0
        while len(left):
            if before >= _MOST_TRIALS:
                raise UsageError(f"no path survived in {before} trials: the laws of draft or target are not finite")
            trial = torch.arange(size, device=keys.device)
            # One path is enough where nothing was rejected.
            wanted = (rejected[left, None] | (trial == 0)).nonzero()
            slot, image = wanted[:, 0], left[wanted[:, 0]]
            row_key = fold(key[image], before + wanted[:, 1])
            noise = fresh_noise(fold(row_key, 1), law.steps, law.dim)
            path = sample_trajectory(law, image * (length + 1) + accepted[image], noise)
            survives = ~rejected[image]
            judged = rejected[image].nonzero()[:, 0]
            if len(judged):
                place = image[judged] * length + accepted[image[judged]]
                target = path.kernels().rows(judged)
                log_q_p = self._against(draft, place, path.states[judged], target)
                survives[judged] = uniform(fold(row_key[judged], 0)).log() > log_q_p
            # The first that survives, image by image.
            order = torch.full((len(left), size), size, device=keys.device)
            order[slot, wanted[:, 1]] = torch.where(survives, wanted[:, 1], size)
            first = order.amin(1)
            taken = survives & (wanted[:, 1] == first[slot])
            out[image[taken]] = path.token[taken]
            left = left[first == size]
            size, before = min(2 * size, _LARGEST_GROUP), before + size
        return out

    def _against(self, draft: Draft, place: Tensor, states: Tensor, target: Gaussian) -> Tensor:
        """log q(Y) / p(Y) of target paths, float64 [R]: ONE call of the draft's head. place: int64 [R], the draft's."""
        law = given(draft.law, self, "the drafts' law")
        return log_ratio(states[:, 1:], score_trajectory(law, place, states), target).sum(-1)
