"""The draft model of Drift-AR (arXiv 2603.28049): a small network predicts the features of the target's next places,
and the target's own one-step decoder takes them and the noise of the sequential sampler to tokens.

Features are predicted by a drafter of the base model, whose body the variant shares; it has to be taught features
(`feature_weight` in its recipe), not only the law that the base model's drafts are drawn from. It drafts before the
target runs (the released code compares afterwards and saves no serial work). The decoder's entropy input is that of the
last committed place. Drafting stops early by the entropy of the drafter's own attention: the paper compares its mean
with a threshold, here the share of drafts that were kept at such an entropy is learnt (drafters/early_stop.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bozzetto.drafters.base import Observation
from bozzetto.drafters.gaussian import CachedGaussian, GaussianDrafter
from bozzetto.drafts import Layout
from bozzetto.laws.chain import Trajectory, sample_trajectory
from bozzetto.targets.drift import DriftTarget


class CachedDrift(CachedGaussian):
    """The cached drafter of a drift variant: the base model's, measuring its attention too. Features come with the
    target's entropy as their last number. entropy: [R, 1], of its attention at the place that it predicted last;
    measured: [R, 1], the target's at the last committed place."""

    probed = 0
    measured: Tensor

    def take_in(self, seen: Observation) -> Tensor:
        assert seen.features is not None
        features, entropy = seen.features[..., :-1], seen.features[..., -1]
        last = (seen.committed[:, None] - 1).repeat(self.copies, 1)
        self.measured = entropy.gather(1, last)
        hidden = super().take_in(replace(seen, features=features))
        self.entropy = self.entropy.gather(1, last)
        return hidden

    def put_out(self, tokens: Tensor, parent: Tensor, layout: Layout) -> Tensor:
        hidden = super().put_out(tokens, parent, layout)
        self.entropy = self.entropy[:, -1:]
        return hidden


class DriftDrafter(GaussianDrafter):
    """Drafts `length` tokens per pass; stop as of `GaussianDrafter`."""

    closed = False
    model: CachedDrift

    def __init__(self, model: CachedDrift, length: int, target: DriftTarget, stop: float = 0.0):
        nothing = torch.zeros(target.schedule.steps, device=target.device)
        super().__init__(model, length, target.schedule.ancestry(target.device), nothing, target.token_dim, stop)
        self.target = target

    def _law(self, hidden: Tensor, shape: tuple[int, int]) -> Any:
        settings = self.start.settings
        features = torch.cat([hidden, self.model.measured[..., None].to(hidden.dtype)], -1)
        return self.target.law(features, settings.guidance, settings.temperature)

    def _draw(self, law: Any, noise: Tensor) -> Trajectory:
        return sample_trajectory(law, None, noise)

    def _flatness(self, hidden: Tensor) -> Tensor:
        return self.model.entropy[: len(self.keys)]
