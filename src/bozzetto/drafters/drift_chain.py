"""The draft model of Drift-AR (arXiv 2603.28049): a small network predicts the features of the target's next places,
and the target's own one-step decoder takes them and the noise of the sequential sampler to tokens.

Features are predicted by a drafter of the base model, whose body the variant shares; it has to be taught features
(`feature_weight` in its recipe), not only the law that the base model's drafts are drawn from. It drafts before the
target runs (the released code compares afterwards and saves no serial work). The decoder's entropy input is that of the
last committed place. Drafting stops early by the entropy of the drafter's own attention: the paper compares its mean
with a threshold, here the share of drafts that were kept at such an entropy is learnt (drafters/outlook.py).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from bozzetto.drafters.path_chain import PathSketcher, SketchChain
from bozzetto.laws.chain import Ancestry, Path, sample_path
from bozzetto.laws.schedules import FlowSchedule


class EntropySketcher(PathSketcher, Protocol):
    """A drafter that measures attention. own: [R, 1], entropy of its attention at the place that it predicted last;
    measured: [R, 1], the target's at the last committed place."""

    own: Tensor
    measured: Tensor


class OneStepTarget(Protocol):
    """What is asked of the target."""

    token_dim: int
    device: torch.device
    schedule: FlowSchedule

    def law(self, features: Tensor, guidance: float, temperature: float, done: int = 0) -> Any: ...


class DriftChain(SketchChain):
    """Drafts `length` tokens per pass; stop as of `SketchChain`."""

    sketcher: EntropySketcher

    def __init__(self, sketcher: EntropySketcher, length: int, target: OneStepTarget, stop: float = 0.0):
        nothing = torch.zeros(target.schedule.steps, device=target.device)
        ancestry: Ancestry = target.schedule.ancestry(target.device)
        super().__init__(sketcher, length, ancestry, nothing, target.token_dim, stop)
        self.target = target

    def _law(self, hidden: Tensor, shape: tuple[int, int]) -> Any:
        settings = self.start.settings
        features = torch.cat([hidden, self.sketcher.measured[..., None].to(hidden.dtype)], -1)
        return self.target.law(features, settings.guidance, settings.temperature)

    def _draw(self, law: Any, noise: Tensor) -> Path:
        return sample_path(law, None, noise)

    def _flatness(self, hidden: Tensor) -> Tensor:
        return self.sketcher.own[: len(self.keys)]
