"""`bozzetto train target RECIPE.yaml` for continuous tokens (family flow or mar), resumably.

Latents of `views` augmented views per image are computed once and kept in the run folder beside the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bozzetto.autoencoders.latents import TINY, LatentDecoder, tiny_latents
from bozzetto.autoencoders.tiny import load_tiny
from bozzetto.checkpoints.folders import CONFIG, FLOW, MASKED, load_latents, read_config, write_model, write_tokenizer
from bozzetto.common.checks import config_from
from bozzetto.data import evaluation_view
from bozzetto.drafters.base import gather_rows
from bozzetto.errors import UsageError
from bozzetto.laws.schedules import FlowSchedule, noised_tables
from bozzetto.targets.flow import FlowConfig, FlowModel
from bozzetto.targets.flow_cache import FlowSampler
from bozzetto.targets.mar import MAR, MARConfig
from bozzetto.targets.mar_target import MARSampler
from bozzetto.train.fit import Fit, autocast, channels_last, encoded, mean_over
from bozzetto.train.pictures import class_names
from bozzetto.train.recipes import FlowRecipe, MARRecipe

LATENTS = "latents.safetensors"
_NOISIEST = 970  # the sampler starts a little below pure noise: see laws/schedules.py
_CHUNK = 64
_MASK_SPREAD = 0.25  # of the share of masked tokens
_KEEP_STEP = 8  # known tokens come in multiples of this, so that there are few shapes


def flow_loss(
    model: FlowModel, labels: Tensor, tokens: Tensor, context: Tensor, times: Tensor, noise: Tensor
) -> Tensor:
    """Mean squared error of the velocity, per number.

    labels [B]; tokens [B, N, D]; context: what the transformer sees of them; times [K, B, N] and noise [K, B, N, D]: K
    draws for the head per token.
    """
    z = model.features(labels, context[:, :-1]).expand(len(times), -1, -1, -1)
    t = times[..., None]
    at = t * tokens + (1 - t) * noise
    predicted = model.velocity(at.flatten(0, 2), times.flatten(), z.flatten(0, 2))
    return (predicted.float() - (tokens - noise).flatten(0, 2)).square().mean()


def mar_loss(
    model: MAR, labels: Tensor, tokens: Tensor, order: Tensor, kept: int, times: Tensor, noise: Tensor
) -> Tensor:
    """Error of the noise plus the variational bound of the learned variances (Nichol and Dhariwal, arXiv 2102.09672),
    over the masked tokens; the first time, whose bound is another one, adds its error only.

    order int64 [B, N]: a permutation of the places, of which the first `kept` are known; times int64 [K, B, N - kept],
    noise [K, B, N - kept, D].
    """
    known, masked = order[:, :kept], order[:, kept:]
    z = gather_rows(model.features(labels, tokens, known), masked).expand(len(times), -1, -1, -1).flatten(0, 2)
    x0 = gather_rows(tokens, masked).expand_as(noise).flatten(0, 2)
    noise, times = noise.flatten(0, 2), times.flatten()
    signal, of_eps, of_noise, low, high = (table[times, None] for table in noised_tables())
    at = signal * x0 + of_eps * noise
    predicted, mix = (part.float() for part in model.predict(at, times.float(), z))
    error = (predicted - noise).square().mean()
    share = (mix + 1) / 2
    log_variance = share * high + (1 - share) * low
    # The mean's share of the bound does not train the mean.
    gap = of_noise * (predicted.detach() - noise)
    bound = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + gap.square() * (-log_variance).exp())
    return error + bound[times > 0].mean() / math.log(2)


def _flow(r: FlowRecipe, shape: dict[str, int]) -> FlowModel:
    head = {"head_width": r.head_width, "head_depth": r.head_depth}
    return FlowModel(FlowConfig(r.dim, r.layers, r.heads, **shape, **head), r.dropout)


def _mar(r: MARRecipe, shape: dict[str, int]) -> MAR:
    config = MARConfig(r.dim, r.depth, r.heads, r.head_width, r.head_depth, **shape, buffer=r.buffer)
    return MAR(config, r.dropout)


def _flow_draw(r: FlowRecipe, tokens: Tensor, generator: torch.Generator, training: bool) -> tuple[Tensor, ...]:
    """Context, times [K, B, N] and noise [K, B, N, D]."""
    context = tokens
    if training and r.context_noise:
        width = r.context_noise * torch.rand(len(tokens), 1, 1, generator=generator)
        context = tokens + width * torch.randn(tokens.shape, generator=generator)
    times = torch.rand(r.draws, *tokens.shape[:2], generator=generator)
    return context, times, torch.randn(r.draws, *tokens.shape, generator=generator)


def _mar_draw(r: MARRecipe, tokens: Tensor, generator: torch.Generator, training: bool) -> tuple[Any, ...]:
    """Order of the places, how many of them are known, times [K, B, M] and noise [K, B, M, D] of the others."""
    batch, length, dim = tokens.shape
    order = torch.rand(batch, length, generator=generator).argsort(1)
    share = 0.0
    while share < r.least_masked:  # the left half of a normal law around 1, cut off
        share = 1 - _MASK_SPREAD * abs(float(torch.randn((), generator=generator)))
    kept = int(length * (1 - share)) // _KEEP_STEP * _KEEP_STEP
    times = torch.randint(1000, (r.draws, batch, length - kept), generator=generator)
    return order, kept, times, torch.randn(*times.shape, dim, generator=generator)


# Of each family: the network of a recipe and the tokens' shape, what a loss draws, the loss, and how N tokens are
# sampled afterwards.
_FAMILIES: Mapping[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Tensor], Callable[[int], Any]]] = {
    FLOW: (_flow, _flow_draw, flow_loss, lambda length: FlowSampler()),
    MASKED: (_mar, _mar_draw, mar_loss, lambda length: MARSampler(passes=length, noisiest=_NOISIEST)),
}


class LatentFit(Fit):
    """Fits a target of continuous tokens, one of _FAMILIES; drafters and variants of one say what theirs are."""

    recipe: Any
    model: Any
    latents_of_target: LatentDecoder | None = None  # of the target that this one is made for

    def take_over(self, target: FlowModel, folder: Path) -> FlowSchedule:
        """From the flow model in a folder that this one is made for: classes, how tokens are scaled, the schedule.
        Raises UsageError where it is not for pictures of the recipe's size."""
        self.known = class_names(folder, target.config.classes)
        self.latents_of_target = load_latents(folder)
        drawn = self.latents_of_target.config.image_size
        if drawn != self.image_size:
            raise UsageError(f"image_size = {self.image_size} is not allowed: {folder} draws {drawn} pixels")
        return config_from(FlowSampler, read_config(folder).get("sampler", {}), folder / CONFIG).schedule

    def guided(self, labels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What a causal network is given of [cond; uncond] rows: labels [2B] and tokens [2B, N - 1, D]."""
        return torch.cat([labels, torch.full_like(labels, self.classes)]), tokens[:, :-1].repeat(2, 1, 1)

    def load_data(self) -> None:
        """Scaled latents: self.latents float16 [n, views, N, D] (not scaled yet), self.test float32 [n', N, D]."""
        self.test_labels = torch.from_numpy(self.held.labels)
        encoder, self.decoder = load_tiny(self.recipe.tiny)
        tables = self.run.kept(LATENTS)
        if tables is None:
            tables = self._encoded(channels_last(encoder))
            self.run.keep(LATENTS, tables)
        self.generator.set_state(tables["generator"])  # as it is after encoding
        sample = tables["train"][:, 0].float().flatten(0, 1)
        self.mean, self.std = sample.mean(0), sample.std(0)
        self.latents = tables["train"]
        self.test = (tables["test"].float() - self.mean) / self.std
        if self.latents_of_target is not None:
            self._scale_as(self.latents_of_target)

    def _encoded(self, encoder: nn.Module) -> dict[str, Tensor]:
        """Latents of views of the training pictures and of the held-out ones, and the generator's state after that."""
        r = self.recipe

        def tokens(x: Tensor) -> Tensor:  # float16 in raster order, [n, h*w, D]
            return encoder(x).float().flatten(2).transpose(1, 2).half()

        views = [encoded(self.data.images, self.augmented, tokens) for _ in tqdm(range(r.views), desc="encoding views")]
        held = encoded(self.held.images, lambda x: evaluation_view(x, r.image_size), tokens)
        return {"train": torch.stack(views, 1), "test": held, "generator": self.generator.get_state()}

    def _scale_as(self, target: LatentDecoder) -> None:
        """Scale tokens as the target's are, whatever views this run has drawn, and keep some of the held-out ones."""
        self.test = self.test * self.std + self.mean
        self.std, self.mean = target.scale.float(), target.shift.float()
        self.test = ((self.test - self.mean) / self.std)[: self.recipe.test_images]
        self.test_labels = self.test_labels[: self.recipe.test_images]

    @property
    def classes(self) -> int:
        return len(self.data.classes)

    def make_model(self) -> nn.Module:
        """Of the shape that the tokens have."""
        self._make, self._draw, self._loss, self._sampler = _FAMILIES[self.recipe.family]
        length, dim = self.test.shape[1:]
        return self._make(self.recipe, {"token_dim": dim, "grid": math.isqrt(length), "classes": self.classes})

    def draw(self, tokens: Tensor, generator: torch.Generator) -> tuple[Any, ...]:
        """What the loss needs besides labels and tokens."""
        return self._draw(self.recipe, tokens, generator, self.model.training)

    def loss(self, labels: Tensor, tokens: Tensor, *drawn: Any) -> Tensor:
        with autocast():
            return self._loss(self.model, labels, tokens, *drawn)

    def batch(self) -> tuple[Any, ...]:
        """Labels [B] (some replaced by the unconditional one), tokens [B, N, D] and the family's draws."""
        r, g = self.recipe, self.generator
        rows = torch.randint(len(self.latents), (r.batch,), generator=g)
        views = torch.randint(self.latents.shape[1], (r.batch,), generator=g)
        labels = torch.from_numpy(self.data.labels)[rows]
        left_out = torch.rand(r.batch, generator=g) < r.class_dropout
        labels = torch.where(left_out, torch.tensor(self.classes), labels)
        tokens = (self.latents[rows, views].float() - self.mean) / self.std
        return labels, tokens, *self.draw(tokens, g)

    def held_out_loss(self) -> float:
        """True labels, the same noise every time."""
        generator = torch.Generator().manual_seed(0)

        def loss(labels: Tensor, tokens: Tensor) -> float:
            return self.loss(labels, tokens, *self.draw(tokens, generator)).item()

        return float(mean_over(_CHUNK, (self.test_labels, self.test), loss))

    def export(self) -> None:
        r, sampler = self.recipe, asdict(self._sampler(self.test.shape[1]))
        notes = self.notes(name=r.name, class_names=self.data.classes, sampler=sampler, held_out_loss=self.best)
        write_model(self.folder, r.family, self.model.config, self.model.state_dict(), notes, r.compact)
        latents = tiny_latents(r.image_size)
        latents.decoder.load_state_dict(self.decoder.state_dict())
        latents.scale.copy_(self.std)
        latents.shift.copy_(self.mean)
        write_tokenizer(self.folder, TINY, latents.config, latents.state_dict(), {})
