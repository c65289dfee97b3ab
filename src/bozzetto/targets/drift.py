"""Drift-AR (arXiv 2603.28049) on a causal flow model: attention's entropy sets the spread of a prior, and one call of a
decoder takes a draw of that prior to a token, where the flow head takes T.

At each place the body gives features h and the entropy E of its attention (eq. 4), a linear map gives the centre z, and

    x_0 = z + sigma(E) eps,   eps ~ N(0, I)   (eq. 7),      token = x_0 + decoder(x_0; h, E).

This is another sampler than the flow head's, not a faster form of it. Under guidance of scale w the decoder is called
once, with h = h_uncond + w (h_cond - h_uncond); it is trained so (train/drift.py). That is ours, as is the conditioning
of the decoder by E.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from bozzetto.common.checks import Count, Layers, Size
from bozzetto.errors import require
from bozzetto.laws.chain import Gaussian, Trajectory
from bozzetto.laws.schedules import FlowSchedule
from bozzetto.runtime.dense import Dense
from bozzetto.runtime.engine import LinearMap
from bozzetto.targets.base import Scores
from bozzetto.targets.denoiser import Denoiser, DenoiserConfig
from bozzetto.targets.flow import FlowModel
from bozzetto.targets.flow_cache import FlowSampler, FlowTarget
from bozzetto.targets.heads import HeadLaw, PackedDenoiser
from bozzetto.targets.layers import attention_entropy


@dataclass(frozen=True)
class DriftConfig:
    """width, depth: of the decoder; largest: sigma_max; heat: tau (eq. 6); tuned: last blocks of the body that are the
    variant's own, with the final norm (0: the body is the base model's, as it is)."""

    width: Size = 384
    depth: Layers = 3
    largest: Annotated[float, Field(gt=0, le=100)] = 0.5
    heat: Annotated[float, Field(ge=0.02, le=1e6)] = 2.0  # exp(1 / heat) is a float32
    tuned: Count = 0

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("depth", 1), ("tuned", 0)):
            require(getattr(self, name) >= least, name, getattr(self, name), f"a whole number >= {least}")
        for name in ("largest", "heat"):
            require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "a number > 0")

    def spread(self, entropy: Tensor) -> Tensor:
        """sigma(E) (eq. 6): entropies in [0, 1] -> deviations in [0, largest]."""
        return self.largest * torch.expm1(entropy / self.heat) / math.expm1(1 / self.heat)


class DriftModel(nn.Module):
    """The whole-sequence network, for training and as the slow twin of the cached decoder. base: a flow model of which
    the body is used (its last `tuned` blocks and final norm are changed in training)."""

    def __init__(self, base: FlowModel, config: DriftConfig):
        super().__init__()
        require(config.tuned <= len(base.layers), "tuned", config.tuned, f"the body has {len(base.layers)} blocks")
        self.config, self.flow, c = config, base, base.config
        self.centre = nn.Linear(c.dim, c.token_dim)
        self.decoder = Denoiser(DenoiserConfig(c.token_dim, c.token_dim, c.dim + 1, config.width, config.depth))

    @property
    def probed(self) -> int:
        """Number of the block whose attention is measured: the last but one."""
        return max(0, len(self.flow.layers) - 2)

    def own(self) -> dict[str, nn.Module]:
        """The modules that are the variant's own, by name."""
        made: dict[str, nn.Module] = {"centre": self.centre, "decoder": self.decoder}
        if self.config.tuned:
            blocks = list(self.flow.layers)
            first = len(blocks) - self.config.tuned
            made |= {f"flow.layers.{first + i}": block for i, block in enumerate(blocks[first:])}
            made["flow.norm"] = self.flow.norm
        return made

    def own_state(self) -> dict[str, Tensor]:
        """Their tensors."""
        return {f"{name}.{key}": value for name, part in self.own().items() for key, value in part.state_dict().items()}

    def features(self, labels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """As `FlowModel.features`, and the entropy at each place, float32 [B, n + 1]."""
        flow = self.flow
        x = torch.cat([flow.cls_embedding(labels), flow.token_embedding(tokens)], 1)
        width = x.shape[1]
        x, rotation = flow.drop(x + flow.positions[:width]), flow.rope[None, :width, None]
        seen = torch.ones(1, width, width, dtype=torch.bool, device=x.device).tril()
        entropy = x.new_zeros(len(x), width)
        for number, block in enumerate(flow.layers):
            if number == self.probed:
                q, k, _ = (part.transpose(1, 2) for part in block.project(x, rotation))
                entropy = attention_entropy(q, k, seen)
            x = block(x, rotation)
        return flow.norm(x), entropy

    def decode(self, features: Tensor, entropy: Tensor, noise: Tensor) -> Tensor:
        """Tokens float32 [..., K, D] from guided features [..., d], entropies [...] and noise [..., K, D]."""
        start = self.centre(features).float()[..., None, :] + self.config.spread(entropy)[..., None, None] * noise
        condition = torch.cat([features, entropy[..., None].to(features.dtype)], -1)
        condition = condition[..., None, :].expand(*noise.shape[:-1], -1).flatten(0, -2)
        times = condition.new_zeros(len(condition))
        return start + self.decoder(start.flatten(0, -2), times, condition).float().view_as(start)


def guided_features(features: Tensor, scale: float | Tensor) -> Tensor:
    """[cond; uncond] rows [2 P, ...] -> [P, ...]. scale: a number, or a tensor that multiplies [P, ...]."""
    cond, uncond = features.chunk(2)
    return torch.lerp(uncond.float(), cond.float(), torch.as_tensor(scale, device=features.device)).to(features.dtype)


def one_step() -> FlowSchedule:
    """The sampler of a drift model as a schedule: one step, without noise of its own, from N(0, I), which says nothing
    about the token, to the token: state + (prediction - state)."""
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return FlowSchedule(time=zero, of_state=one, of_velocity=one, std=zero)


class DriftLaw(HeadLaw):
    """Laws of the tokens at B W places: a chain of one step that maps noise to the token. features [R, W, d + 1], the
    last number the entropy; a temperature multiplies sigma."""

    isotropic = False
    coefficients = torch.tensor([[1.0, 1.0, 0.0]])  # state + prediction, from where a chain starts

    def __init__(self, target: DriftTarget, features: Tensor, batch: int, guidance: float, temperature: float):
        shape = (batch, features.shape[1])
        hidden, entropy = features[..., :-1], features[:batch, :, -1].float()
        if guidance != 1:
            hidden = guided_features(hidden, guidance)
        hidden, entropy = hidden.flatten(0, 1), entropy.flatten()
        condition = torch.cat([hidden, entropy[:, None].to(hidden.dtype)], -1)
        super().__init__(target.head, condition, shape, 1.0, 1.0)
        self.centre = target.centre(hidden).float()
        self.spread = target.model.config.spread(entropy)[:, None] * temperature
        self.ancestry = one_step().ancestry(features.device)

    def std_later(self, std: Tensor, step: Tensor, later: Tensor) -> Tensor:
        return std.unsqueeze(-2).expand(*later.shape, -1)

    def kernel(self, x: Tensor, step: Tensor, place: Tensor) -> Gaussian:
        start = torch.addcmul(self.centre[place], self.spread[place], x)
        return self._point(start + self.predict(start, step, place))

    def run(self, noise: Tensor) -> Trajectory:
        if self.head.own:
            noise = torch.stack([torch.addcmul(self.centre, self.spread, noise[:, 0]), noise[:, 1]], 1)
        return super().run(noise)

    def all_places(self, x: Tensor, step: int) -> Gaussian:
        start = torch.addcmul(self.centre, self.spread, x)
        return self._point(start + self.predict_all(start, step))

    def _point(self, token: Tensor) -> Gaussian:
        return Gaussian(token, token.new_zeros(len(token), 1))


class DriftTarget(FlowTarget):
    """A drift model ready to decode: a flow target whose passes also measure the entropy, with another law."""

    centre: Dense | LinearMap
    one_step = True

    @torch.no_grad()
    def __init__(self, model: DriftModel, dtype: torch.dtype = torch.float32):
        self.model, self.probed = model, model.probed
        super().__init__(model.flow, FlowSampler(steps=1), dtype, lambda: model.flow)
        self.schedule = one_step()

    def denoiser(self, model: FlowModel) -> Denoiser:
        return self.model.decoder

    @torch.no_grad()
    def use_head(self, net: Denoiser, sampler: FlowSampler) -> None:
        self.centre = self.map_of(self.model.centre)
        self.head = PackedDenoiser(self.model.decoder, torch.zeros(1), self.dtype, self.own)
        self.sample_with(sampler)

    def sample_with(self, sampler: FlowSampler) -> None:
        """There is one way only."""
        self.sampler, self.schedule = sampler, one_step()

    def read_out(self, x: Tensor) -> Scores:
        return Scores(None, x)

    def law(self, features: Tensor, guidance: float, temperature: float, done: int = 0) -> Any:
        """features [R, W, d + 1], [cond; uncond] rows where guidance is not 1."""
        batch = len(features) if guidance == 1 else len(features) // 2
        return DriftLaw(self, features, batch, guidance, temperature)
