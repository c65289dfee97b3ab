"""`bozzetto train drift RECIPE.yaml`: fit a drift variant (targets/drift.py) of a trained flow model, resumably.

Two phases in one loss (Drift-AR, arXiv 2603.28049, eq. 9 and 10): alpha (regression + entropy) + (1 - alpha) drifting,
alpha falling linearly; from a share of the steps on the body stands still. The drifting (eq. 8) takes place per token:
samples of the decoder are moved towards samples that the flow head, the teacher, draws at the same place and guidance,
and away from each other, by forces that cancel where both have the same law. (The paper takes pictures of the class as
positives; a causal model needs the law of a token given its context, of which a picture holds one draw only.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bozzetto.checkpoints.folders import load_base, save_drift
from bozzetto.drafters.base import gather_rows
from bozzetto.laws.schedules import FlowSchedule
from bozzetto.targets.drift import DriftConfig, DriftModel, guided_features
from bozzetto.targets.flow import TIME_SCALE
from bozzetto.targets.heads import PackedDenoiser, flow_coefficients
from bozzetto.train.continuous import LatentFit
from bozzetto.train.fit import autocast, compute_dtype, mean_over
from bozzetto.train.recipes import DriftRecipe

_ROWS = 16


def drift_force(made: Tensor, real: Tensor, bandwidths: Sequence[float]) -> Tensor:
    """What moves generated samples, [P, G, D]: made [P, G, D], real [P, M, D] at each of P places. Each bandwidth's
    force has unit size."""
    total = torch.zeros_like(made)
    for bandwidth in bandwidths:
        force = anti_symmetric_force(made, real, bandwidth)
        total = total + force / force.square().mean().sqrt().clamp_min(1e-8)
    return total


def anti_symmetric_force(made: Tensor, real: Tensor, bandwidth: float) -> Tensor:
    """The force of eq. 8, shapes as above; it is 0 where both laws are the same.

    Affinities are the geometric mean of the softmax of -distance / bandwidth over both ways, with distances over their
    mean and without self-pairs. A sample goes towards the real ones by its affinity to the generated ones and away from
    these by its affinity to the real ones.
    """
    apart = torch.cdist(made, torch.cat([real, made], 1))  # [P, G, M + G]
    count = real.shape[1]
    itself = torch.eye(made.shape[1], dtype=torch.bool, device=made.device)
    itself = torch.nn.functional.pad(itself, (count, 0))
    mean = apart.sum() / (apart.numel() - itself.sum() * len(apart))  # of a sample to itself it is 0
    logits = (-apart / (mean * bandwidth)).masked_fill(itself, -torch.inf)
    near = (logits.log_softmax(-1) + logits.log_softmax(-2)).mul(0.5).exp()
    to_real, to_made = near.split([count, made.shape[1]], -1)
    pull = (to_real * to_made.sum(-1, keepdim=True)) @ real
    push = (to_made * to_real.sum(-1, keepdim=True)) @ made
    return pull - push


def energy_distance(made: Tensor, real: Tensor) -> Tensor:
    """Unbiased squared energy distance of two sets of samples per place, mean over places: made [P, G, D], real [P, M,
    D], G, M > 1."""
    within = [torch.cdist(x, x).sum((-1, -2)) / (x.shape[1] * (x.shape[1] - 1)) for x in (made, real)]
    return (2 * torch.cdist(made, real).mean((-1, -2)) - within[0] - within[1]).mean()


@torch.no_grad()
def teacher_tokens(
    head: PackedDenoiser, schedule: FlowSchedule, features: Tensor, scale: Tensor, noise: Tensor
) -> Tensor:
    """Samples of the flow head: features [2 P, d], [cond; uncond]; scale [P]; noise [T + 1, P, K, D] -> [P, K, D]."""
    condition, scale = head.embed(features), scale[:, None, None]
    coefficients = flow_coefficients(schedule, 1.0, features.device)
    x = noise[0]
    for step in range(schedule.steps):
        modulation = head.modulations(condition, torch.tensor([step]))[0]  # [2 P, ...]
        cond, uncond = head(x.repeat(2, 1, 1), modulation[:, None].expand(-1, x.shape[1], -1)).chunk(2)
        of_state, of_velocity, std = coefficients[step]
        x = of_state * x + of_velocity * torch.lerp(uncond, cond, scale) + std * noise[step + 1]
    return x


class DriftFit(LatentFit):
    """Fits a DriftModel."""

    title = "drift"
    recipe: DriftRecipe
    model: DriftModel

    def load_target(self) -> None:
        self.teacher = load_base(self.target_folder)
        self.schedule = self.take_over(self.teacher, self.target_folder)
        self.head = PackedDenoiser(self.teacher.head, self.schedule.time * TIME_SCALE, compute_dtype())

    def make_model(self) -> nn.Module:
        r = self.recipe
        config = DriftConfig(r.decoder_width, r.decoder_depth, r.largest, r.heat, r.tuned)
        model = DriftModel(load_base(self.target_folder), config)
        for part in model.own().values():
            part.requires_grad_(True)
        return model

    @property
    def share(self) -> float:
        """Of the steps, done."""
        return self.step / self.recipe.steps

    def draw(self, tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """alpha; guidance scale [B]; places int64 [B, n]; noise of the context [B, N, D], of the teacher [T + 1, B n,
        K, D] and of the decoder [B n, G, D]."""
        r, (batch, length, dim) = self.recipe, tokens.shape
        scale = self.scales(batch, generator)
        places = torch.rand(batch, length, generator=generator).argsort(1)[:, : r.places]
        width = r.context_noise * torch.rand(batch, 1, 1, generator=generator)
        context = width * torch.randn(tokens.shape, generator=generator)
        rows = places.numel()
        real = torch.randn(self.schedule.steps + 1, rows, r.positives, dim, generator=generator)
        alpha = torch.tensor(r.alpha * (1 - self.share))
        return alpha, scale, places, context, real, torch.randn(rows, r.generated, dim, generator=generator)

    def loss(self, labels: Tensor, tokens: Tensor, *drawn: Tensor) -> Tensor:
        alpha, scale, places, context, real, noise = drawn
        moving = self.model.config.tuned > 0 and self.share < self.recipe.frozen_from
        hidden, entropy = self.at_places(labels, tokens + context, scale, places, moving)
        wanted = self.targets(labels, tokens + context, scale, places, real)
        with autocast():
            made = self.model.decode(hidden, entropy, noise)
            centre = self.model.centre(hidden).float()
        fixed = made.detach()
        goal = fixed + drift_force(fixed, wanted, self.recipe.bandwidths)
        drifting = (made - goal).square().mean()
        regression = (centre - wanted.mean(1)).square().mean()
        return alpha * (regression - self.recipe.entropy_weight * entropy.mean()) + (1 - alpha) * drifting

    def at_places(
        self, labels: Tensor, context: Tensor, scale: Tensor, places: Tensor, moving: bool
    ) -> tuple[Tensor, Tensor]:
        """Guided features [B n, d] and entropies [B n] at places int64 [B, n]."""
        with autocast(), torch.set_grad_enabled(moving):
            hidden, entropy = self.model.features(*self.guided(labels, context))
        hidden = guided_features(gather_rows(hidden, places), scale[:, None, None])
        return hidden.flatten(0, 1), entropy[: len(labels)].gather(1, places).flatten()

    @torch.no_grad()
    def targets(self, labels: Tensor, context: Tensor, scale: Tensor, places: Tensor, noise: Tensor) -> Tensor:
        """The teacher's samples [B n, K, D]."""
        with autocast():
            features = self.teacher.features(*self.guided(labels, context))
        each = scale[:, None].expand(-1, places.shape[1]).flatten()
        return teacher_tokens(self.head, self.schedule, gather_rows(features, places).flatten(0, 1), each, noise)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Energy distance to the teacher, mean over places of held-out pictures."""
        generator = torch.Generator().manual_seed(0)

        def distance(labels: Tensor, tokens: Tensor) -> float:
            _, scale, places, _, real, noise = self.draw(tokens, generator)
            hidden, entropy = self.at_places(labels, tokens, scale, places, False)
            wanted = self.targets(labels, tokens, scale, places, real)
            with autocast():
                made = self.model.decode(hidden, entropy, noise)
            return energy_distance(made, wanted).item()

        return float(mean_over(_ROWS, (self.test_labels, self.test), distance))

    def export(self) -> None:
        notes = self.notes(name=self.recipe.name, energy_distance=self.best)
        save_drift(self.folder, self.model, self.recipe.model, self.target_folder, notes)
