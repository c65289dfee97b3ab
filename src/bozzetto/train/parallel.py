"""`bozzetto train drafter RECIPE.yaml` with `family: plane`, `block` or `glance`: fit a parallel drafter.

As for an EAGLE-style drafter, losses are taken on the guided laws; a step looks at the places after some anchors of
each picture, held-out acceptance at those after evenly spaced ones. Laws of later places are taken given the true
tokens before, as verification does while drafts are kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bozzetto.drafters.base import gather_rows
from bozzetto.train.drafter import DrafterFit
from bozzetto.train.fit import autocast
from bozzetto.train.recipes import ParallelRecipe

_EVERY = 11  # pairs between held-out anchors


class ParallelFit(DrafterFit):
    """Fits the network of any of these families."""

    recipe: ParallelRecipe

    def load_target(self) -> None:
        self.family = self.recipe.family
        super().load_target()

    def draws(self, batch: int) -> tuple[Tensor, ...]:
        """Anchors int64 [B, A]."""
        pairs, r = self.target.config.length - 1, self.recipe
        return (torch.rand(batch, pairs, generator=self.generator).argsort(1)[:, : min(r.anchors, pairs)],)

    def loss(self, features: Tensor, fed: Tensor, tokens: Tensor, scale: Tensor, *drawn: Tensor) -> Tensor:
        r = self.recipe
        log_p, log_q, real, near = self.both(features, fed, tokens, scale, drawn[0])
        weight = real * r.decay ** torch.arange(r.places)
        loss = self.apart(log_p.flatten(1, 2), log_q.flatten(1, 2)).view_as(weight)
        if r.feature_weight:
            copies = len(near) // len(weight)
            loss = loss + r.feature_weight * near.view(copies, *weight.shape).mean(0)
        return (loss * weight).sum() / weight.sum()

    def both(
        self, features: Tensor, fed: Tensor, tokens: Tensor, scale: Tensor, anchors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-laws of target and drafter [B, A, K, V], which places are inside the picture, float [B, A, K], and the
        distance of the predicted features, [R, A, K]. anchors int64 [B, A]."""
        copies, (batch, count) = len(features) // len(scale), anchors.shape
        every = anchors.repeat(copies, 1)
        with autocast():
            guessed = self.model.after(fed[:, :-1], self.rows[tokens[:, :-1]], every)  # [R, A, K, d]
        place = every[..., None] + torch.arange(1, self.recipe.places + 1)
        inside = place.clamp_max(features.shape[1] - 1).flatten(1)  # [R, A K]
        wanted = gather_rows(features, inside)
        with autocast():
            more = self.model.bias(tokens.gather(1, inside - 1))
        log_p = self.laws(wanted, scale)
        log_q = self.laws(guessed.flatten(1, 2), scale, more)
        near = F.smooth_l1_loss(guessed.flatten(1, 2).float(), wanted.float(), reduction="none").mean(-1)
        real = (place[:batch] < features.shape[1]).float()
        shape = (count, self.recipe.places)
        return log_p.unflatten(1, shape), log_q.unflatten(1, shape), real, near.unflatten(1, shape)

    def overlaps(self, features: Tensor, tokens: Tensor, scale: Tensor) -> Tensor:
        last = self.target.config.length - 1 - self.recipe.places
        anchors = torch.arange(0, max(1, last), _EVERY).expand(len(scale), -1)
        log_p, log_q, *_ = self.both(features, features, tokens, scale, anchors)
        return torch.minimum(log_p.exp(), log_q.exp()).sum(-1).mean(1).sum(0).double()
