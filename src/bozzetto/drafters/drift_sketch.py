"""The cached drafter of a drift variant: the base model's (drafters/path_sketch.py), measuring its attention too."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from bozzetto.drafters.base import Observation
from bozzetto.drafters.path_sketch import PathSketcher
from bozzetto.drafts import Layout
from bozzetto.targets.entropy import attention_entropy


class DriftSketcher(PathSketcher):
    """Features come with the target's entropy as their last number. own, measured: see drafters/drift_chain.py."""

    own: Tensor
    measured: Tensor

    def take_in(self, seen: Observation) -> Tensor:
        assert seen.features is not None
        features, entropy = seen.features[..., :-1], seen.features[..., -1]
        last = (seen.committed[:, None] - 1).repeat(self.copies, 1)
        self.measured = entropy.gather(1, last)
        hidden = super().take_in(replace(seen, features=features))
        self.own = self.own.gather(1, last)
        return hidden

    def put_out(self, tokens: Tensor, parent: Tensor, layout: Layout) -> Tensor:
        hidden = super().put_out(tokens, parent, layout)
        self.own = self.own[:, -1:]
        return hidden

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        self.own = attention_entropy(q, keys, mask[:, 0] == 0)
        return super()._attend(q, keys, values, mask)
