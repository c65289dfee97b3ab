"""`bozzetto train drafter RECIPE.yaml` with `family: sketch`: fit a drafter of continuous tokens to a trained flow
target, resumably.

The loss is V = sum over denoising steps of (of_token / std)^2 |x^_p - x^_q|^2, with x^ the tokens that target and draft
predict from the same state: twice the Kullback-Leibler divergence of the two trajectories' laws. The chance
that a draft is kept is 1 - TV >= 1 - sqrt(V) / 2 at best (Pinsker). Both sides are guided as in drafting, and taken
over several steps of the drafter's own roll-out. A recipe may add, or take alone, the error of the predicted features:
a drift variant's decoder is given these (Drift-AR, arXiv 2603.28049, eq. 3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.checkpoints.folders import (
    FLOW,
    MASKED,
    SKETCH,
    load_drafter,
    load_target,
    save_drafter,
    target_digest,
)
from bozzetto.drafters.gaussian import GaussianNet, gaussian_config
from bozzetto.errors import UsageError
from bozzetto.targets.flow import FlowModel
from bozzetto.train.continuous import LatentFit
from bozzetto.train.fit import autocast, decayed_mean, mean_over
from bozzetto.train.recipes import SketchRecipe

_ROWS = 16
_DEPTHS = 4  # of the roll-out in the held-out report


class GaussianFit(LatentFit):
    """Fits a GaussianNet."""

    family, title, shown = SKETCH, "drafter", False
    recipe: SketchRecipe
    model: GaussianNet

    def load_target(self) -> None:
        target = load_target(self.target_folder, FLOW, MASKED)
        if not isinstance(target, FlowModel):
            raise UsageError(f"{self.target_folder}: a drafter of continuous tokens is for a flow model")
        self.target = target
        schedule = self.take_over(target, self.target_folder)
        self.ancestry, self.times = schedule.ancestry(torch.device("cpu")), schedule.time.float()
        self.weights = (self.ancestry.of_token / schedule.std.float()).square()  # [T]

    def make_model(self) -> nn.Module:
        net = GaussianNet(gaussian_config(self.target.config))
        if self.recipe.init:
            digest = target_digest(self.target_folder)
            net = load_drafter(self.recipe.init, SKETCH, self.target.config, digest).requires_grad_(True)
        self.turn = nn.utils.parametrizations.orthogonal(net, "basis")
        return net

    def draw(self, tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Guidance scale [B]; steps int64 [B, N] and noise [B, N, D] of the states at which the laws are compared."""
        scale = self.scales(len(tokens), generator)
        steps = torch.randint(len(self.times), tokens.shape[:2], generator=generator)
        return scale, steps, torch.randn(tokens.shape, generator=generator)

    def loss(self, labels: Tensor, tokens: Tensor, *drawn: Tensor) -> Tensor:
        """Mean over roll-out steps (step k weighs decay^(k-1)) of the errors per token."""
        parts = self.errors(self.recipe.rollout, labels, tokens, *drawn)
        return decayed_mean((part.mean() for part in parts), self.recipe.decay)

    def errors(
        self, steps: int, labels: Tensor, tokens: Tensor, scale: Tensor, at: Tensor, noise: Tensor
    ) -> list[Tensor]:
        """An unbiased draw of V for every token but the first few, and the error of its features, as the recipe weighs
        them, for each of `steps` roll-out steps: [B, n]."""
        r = self.recipe
        both, past = self.guided(labels, tokens)
        with autocast():
            with torch.no_grad():
                features = self.target.features(both, past)  # [2B, N, d]
                embedded = self.target.token_embedding(past)
                wanted, state = self._target_tokens(features, tokens, scale, at, noise)
            rolled = self.model.body.roll_out(features[:, :-1], embedded, steps)
        found = []
        for k, predicted in enumerate(rolled):
            with autocast():
                guess = self._draft_tokens(predicted, scale, at[:, 1:], state[:, 1:])
            apart = (guess - wanted[:, 1:]).square().sum(-1) * self.weights[at[:, 1:]] * len(self.times)
            apart = r.divergence_weight * apart
            if r.feature_weight:
                missed = F.smooth_l1_loss(predicted.float(), features[:, 1:].float(), reduction="none").mean(-1)
                apart = apart + r.feature_weight * torch.stack(missed.chunk(2)).mean(0)
            found.append(apart[:, k:])  # the first pairs of step k have too short a past
        return found

    def _target_tokens(
        self, features: Tensor, tokens: Tensor, scale: Tensor, at: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The target's guided prediction of each token from a noised state of it, and that state: [B, N, D]."""
        time = self.times[at][..., None]
        state = time * tokens + (1 - time) * noise
        rows = (state.repeat(2, 1, 1).flatten(0, 1), self.times[at].repeat(2, 1).flatten(), features.flatten(0, 1))
        cond, uncond = self.target.velocity(*rows).float().unflatten(0, (2, *at.shape)).unbind(0)
        velocity = torch.lerp(uncond, cond, scale[:, None, None])
        return state + (1 - time) * velocity, state

    def _draft_tokens(self, predicted: Tensor, scale: Tensor, at: Tensor, state: Tensor) -> Tensor:
        """The draft's guided prediction from the same states."""
        basis = self.model.basis.float()
        centre, variance = self.model.gaussian(predicted)
        turned = (state @ basis.T).repeat(2, 1, 1)
        both = at.repeat(2, 1)
        signal, width = self.ancestry.signal[both][..., None], self.ancestry.noise[both][..., None]
        gain = signal * variance / (signal.square() * variance + width.square())
        cond, uncond = torch.addcmul(centre, gain, turned - signal * centre).chunk(2)
        return torch.lerp(uncond, cond, scale[:, None, None]) @ basis

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Errors of the first drafts, mean over held-out pictures; `by_depth` keeps those of deeper ones too."""
        generator = torch.Generator().manual_seed(0)

        def errors(labels: Tensor, tokens: Tensor) -> Tensor:
            parts = self.errors(_DEPTHS, labels, tokens, *self.draw(tokens, generator))
            return torch.stack([part.mean() for part in parts])

        self.by_depth = mean_over(_ROWS, (self.test_labels, self.test), errors).tolist()
        return self.by_depth[0]

    def export(self) -> None:
        plain = GaussianNet(self.model.config)
        state = {name: value for name, value in self.model.state_dict().items() if "parametrizations" not in name}
        plain.load_state_dict({**state, "basis": self.model.basis.detach()})
        notes = self.notes(target_name=self.target_name, divergence_by_depth=[round(v, 3) for v in self.by_depth])
        save_drafter(self.folder, plain, self.target_folder, notes, compact=True)
