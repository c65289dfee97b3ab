"""The draft model of continuous tokens: the target's next feature, then a Gaussian law of the next token.

An EAGLE layer (drafters/eagle.py) predicts the target's next feature from its features and tokens so far; a small
read-out turns that into a Gaussian whose axes are the same for all tokens. The Gaussian's denoising chain is known in
closed form (laws/gaussian.py), so a drafted token costs one layer and no call of a head.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.common.checks import Grid, Size
from bozzetto.drafters.base import Drafter, Start
from bozzetto.drafters.eagle import EagleConfig, EagleLayerCache, EagleNet
from bozzetto.drafts import Draft
from bozzetto.drafts.tree import link
from bozzetto.laws.chain import Ancestry, Trajectory
from bozzetto.laws.gaussian import AffineChain, gaussian_tables
from bozzetto.laws.noise import fold, fresh_noise
from bozzetto.runtime.dense import Dense
from bozzetto.runtime.engine import LinearMap
from bozzetto.runtime.gauss import own_drafts
from bozzetto.targets.flow import FlowConfig

_LARGEST_LOG = 3.0  # of a token's deviation: more says nothing
_NARROW, _WIDE = -2.0, 1.0  # log deviations of a token between which the law's width is told apart
_NOBODYS = 1e3  # a number that is no token's: tokens have a deviation of 1


@dataclass(frozen=True)
class GaussianConfig:
    """dim, heads, ffn: of the layer (dim is the target's); token_dim: D; grid: the target's; width: of the read-out's
    hidden layer."""

    dim: Size
    heads: Size
    ffn: Size
    token_dim: Size
    grid: Grid
    width: Size = 512

    def __post_init__(self) -> None:
        _ = self.layer  # raises UsageError for a shape that a layer cannot have

    @property
    def layer(self) -> EagleConfig:
        """The layer's config; there is no codebook."""
        return EagleConfig(self.dim, self.heads, self.ffn, 1, self.grid)


def gaussian_config(target: FlowConfig) -> GaussianConfig:
    """A drafter with a layer of the target's shape."""
    body = target.body
    return GaussianConfig(body.dim, body.heads, body.ffn, target.token_dim, target.grid)


class GaussianNet(nn.Module):
    """The trainable part; tokens are embedded by the target, frozen."""

    def __init__(self, config: GaussianConfig):
        super().__init__()
        self.config = config
        self.body = EagleNet(config.layer)
        self.hidden = nn.Linear(config.dim, config.width)
        self.readout = nn.Linear(config.width, 2 * config.token_dim)
        self.basis = nn.Parameter(torch.eye(config.token_dim))  # rows are the axes
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    def gaussian(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted features [..., d] -> centre, variance along the axes, float32 [..., D]."""
        centre, log_std = self.readout(F.silu(self.hidden(features))).float().chunk(2, -1)
        return centre, bounded(log_std)


def nearest_rotation(basis: Tensor) -> Tensor:
    """The orthogonal matrix nearest to [D, D]: stored axes are rounded, and drafts whose axes are not orthogonal would
    not have the deviations that they claim."""
    left, _, right = torch.linalg.svd(basis.double())
    return (left @ right).float()


def bounded(log_std: Tensor) -> Tensor:
    """Variance of a log deviation, kept in bounds."""
    return (2 * _LARGEST_LOG * torch.tanh(log_std / _LARGEST_LOG)).exp()


class CachedGaussian(EagleLayerCache):
    """The cached drafter, computing in the dtype of `embedding`, the target's map from tokens to inputs."""

    @torch.no_grad()
    def __init__(self, net: GaussianNet, embedding: Dense | LinearMap):
        super().__init__(net.body, embedding.dtype, isinstance(embedding, LinearMap))
        self.embedding, form = embedding, type(embedding)
        self.hidden, self.readout = form.of(net.hidden, self.dtype), form.of(net.readout, torch.float32)
        self.basis = nearest_rotation(net.basis.detach().float())

    def embed(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens.to(self.dtype))

    def whole(self) -> tuple[Any, ...]:
        """What our kernels need to draft whole chains from it (runtime/gauss.py)."""
        network, given = self.decoder.network.struct, self.cache.given.struct  # type: ignore[union-attr]
        maps: list[Any] = [self.embedding, self.fc, self.hidden, self.readout]
        return network, given, *(m.struct for m in maps), _LARGEST_LOG

    def gaussian(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """As `GaussianNet.gaussian`."""
        centre, log_std = self.readout(self.hidden.silu(features).float()).chunk(2, -1)
        return centre, bounded(log_std)


class GaussianDrafter(Drafter):
    """Drafts `length` tokens per pass. ancestry, std float64 [T]: the target's sampler; stop: an image's draft ends
    where its next token is reached with less than this chance (drafters/early_stop.py; 0: nowhere), for rules that
    compare tokens with the target's own: what is left of the draft are numbers that no target draws."""

    name = "sketch"
    closed = True  # whether a token's law is a Gaussian, so that our kernels draft whole chains
    model: CachedGaussian
    dim: int

    def __init__(
        self, model: CachedGaussian, length: int, ancestry: Ancestry, std: Tensor, dim: int, stop: float = 0.0
    ):
        self.model, self.length, self.dim = copy.copy(model), length, dim
        self.ancestry, self.std, self.stop = ancestry, std, stop

    @property
    def max_nodes(self) -> int:
        return self.length

    def begin(self, start: Start) -> None:
        super().begin(start)
        self.tempered = (self.std * start.settings.temperature).float()  # rounded as the law's

    def propose(self, batch: int, limit: int) -> Draft:
        self.passes = self.passes + 1
        length = min(limit, self.length)
        if self.early is not None:
            self.early.begin(0 if self.seen is None else length)
        if self.seen is None or length < 1:  # nothing is known before the first pass
            return self.nothing(batch)
        hidden = self.model.take_in(self.seen)
        noise = self._noise(self.seen.start + self.seen.committed, length)
        if self.closed and self.model.own and self.early is None:
            return self._whole(hidden, noise)
        laws: list[Any] = []
        drawn: list[Trajectory] = []
        for place in range(length):
            laws.append(self._law(hidden, (batch, 1)))
            drawn.append(self._draw(laws[-1], noise[:, place]))
            if not self._goes_on(place, hidden):
                break
            if place + 1 < length:
                layout = link(place, self.keys.device)
                hidden = self.model.put_out(drawn[-1].token[:, None], layout.slot, layout)
        trajectory = Trajectory(*(torch.stack(parts, 1) for parts in zip(*drawn, strict=True)))
        if self.start.with_laws:
            return Draft(trajectory.token, trajectory=trajectory, law=self._together(laws, batch))
        if self.early is None:
            return Draft(trajectory.token)
        present = self.early.present[:, 1 : len(drawn) + 1, None]
        return Draft(trajectory.token.masked_fill(~present, _NOBODYS))

    def _whole(self, hidden: Tensor, noise: Tensor) -> Draft:
        """The same as one call: hidden [R, 1, d], noise float32 [B, L, T + 1, D]."""
        settings, basis, std = self.start.settings, self.model.basis, self.tempered
        sampler = self.ancestry, std, basis, settings.guidance if settings.guided else None
        gain, offset, trajectory = own_drafts(self.model.whole(), hidden, self.model.next, noise, sampler)
        if not self.start.with_laws:
            return Draft(trajectory.token)
        law = AffineChain(gain, offset, self.ancestry, std, (len(noise), noise.shape[1]), basis)
        return Draft(trajectory.token, trajectory=trajectory, law=law)

    def _goes_on(self, place: int, hidden: Tensor) -> bool:
        """Whether any image drafts on after a place, whose law hidden [R, 1, d] gave."""
        if self.early is None:
            return True
        at = torch.tensor([place], device=hidden.device)
        return self.early.go_on(at, at[None] + 1, self._flatness(hidden))

    def _flatness(self, hidden: Tensor) -> Tensor:
        """How wide the drafter's law is: [R, 1, d] -> [B, 1] in [0, 1]."""
        _, variance = self.model.gaussian(hidden[: len(self.keys)])
        return (0.5 * variance.log().mean(-1) - _NARROW) / (_WIDE - _NARROW)

    def _noise(self, position: Tensor, length: int) -> Tensor:
        """float32 [B, length, T + 1, D] for positions from int64 [B] on: the sequential sampler's where the rule wants
        that, else fresh."""
        offset = torch.arange(length, device=position.device)
        if self.start.fixed_noise:
            return self.start.noise.rows(position[:, None] + offset)
        keys = fold(fold(self.keys, self.passes)[:, None], offset)
        return fresh_noise(keys.flatten(), len(self.std), self.dim).unflatten(0, keys.shape)

    def _law(self, hidden: Tensor, shape: tuple[int, int]) -> AffineChain:
        """Of the next token of each image, guided: hidden [R, 1, d]."""
        settings = self.start.settings
        gain, offset = gaussian_tables(*self.model.gaussian(hidden[:, 0]), self.ancestry)
        if settings.guided:  # means are linear in the prediction: so are gains and offsets
            (gain, other), (offset, without) = gain.chunk(2, 1), offset.chunk(2, 1)
            gain = torch.lerp(other, gain, settings.guidance)
            offset = torch.lerp(without, offset, settings.guidance)
        return AffineChain(gain, offset, self.ancestry, self.tempered, shape, self.model.basis)

    def _draw(self, law: Any, noise: Tensor) -> Trajectory:
        """One trajectory per image: noise float32 [B, T + 1, D]."""
        return law.sample(noise)

    def _together(self, laws: list[AffineChain], batch: int) -> AffineChain:
        """One law of all drafted places, numbered image by image."""
        gain, offset = (torch.stack([getattr(law, n) for law in laws], 2).flatten(1, 2) for n in ("gain", "offset"))
        return AffineChain(gain, offset, self.ancestry, laws[0].std, (batch, len(laws)), self.model.basis)
