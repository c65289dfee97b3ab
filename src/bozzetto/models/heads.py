"""Denoising heads as laws: what laws/chain.py asks for, from a `Denoiser` and the backbone's conditions.

The modulations of a head (shift, scale, gate) depend on the step and on the condition but not on the noisy token, so
those of all steps and places of a pass are computed at once, in one wide product; a serial call of the head is left
with the narrow layers only. These run in float32: with a few rows they are bound by overhead, and their rounding is
what the end of a chain sees.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bozzetto.laws.chain import Gaussian
from bozzetto.laws.schedules import DiffusionSchedule, FlowSchedule
from bozzetto.models.denoiser import Denoiser

_LN_EPS = 1e-6
_LEAST_GAP = 1e-2  # between the bounds of a log variance, for the mix to be read off


class _Narrow(NamedTuple):
    """A block's layers, float32: gain and bias of its norm, weights and biases of its two linear maps."""

    gain: Tensor
    bias: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor


class PackedDenoiser:
    """A denoiser ready for decoding: modulations side by side in `dtype`, narrow layers in float32, embeddings of the
    given times."""

    @torch.no_grad()
    def __init__(self, net: Denoiser, times: Tensor, dtype: torch.dtype):
        """times: [T], what the network is told at each step of the sampler (0 to 1000)."""
        self.width, self.depth, self.dtype = net.config.width, net.config.depth, dtype
        self.steps, self.token_dim, self.out_dim = len(times), net.config.token_dim, net.config.out_dim
        device = net.input_proj.weight.device
        self.times = net.time_embed(times.to(device)).to(dtype)  # [T, width]
        self.condition = (net.cond_embed.weight.to(dtype), net.cond_embed.bias.to(dtype))
        self.input = (net.input_proj.weight.float(), net.input_proj.bias.float())
        self.output = (net.final_layer.linear.weight.float(), net.final_layer.linear.bias.float())
        parts = [block.modulation for block in [*net.blocks, net.final_layer]]
        weight, bias = (torch.cat([getattr(p, name) for p in parts]).clone() for name in ("weight", "bias"))
        for start in self._scales():  # "1 + scale" becomes part of the bias
            bias[start : start + self.width] += 1
        self.modulation = (weight.to(dtype), bias.to(dtype))  # [(3 depth + 2) width, width]
        self.blocks = [_Narrow(*(p.float() for p in (b.in_ln.weight, b.in_ln.bias, *b.linears))) for b in net.blocks]

    def _scales(self) -> list[int]:
        """Where the scales begin among the modulations: each block has shift, scale, gate, the last shift, scale."""
        return [self.width * (3 * i + 1) for i in range(self.depth + 1)]

    def embed(self, condition: Tensor) -> Tensor:
        """Conditions [P, C] -> [P, width]."""
        return F.linear(condition.to(self.dtype), *self.condition)

    def modulations(self, condition: Tensor, steps: Tensor) -> Tensor:
        """Embedded conditions [P, width] at steps int64 [K] -> [K, P, (3 depth + 2) width]."""
        return F.linear(F.silu(self.times[steps][:, None] + condition), *self.modulation)

    def __call__(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x [R, D] with their modulations [R, (3 depth + 2) width] -> predictions, float32 [R, out_dim]."""
        shape, parts = (self.width,), modulation.float().split(self.width, -1)
        x = F.linear(x, *self.input)
        for i, block in enumerate(self.blocks):
            shift, scale, gate = parts[3 * i : 3 * i + 3]
            h = torch.addcmul(shift, F.layer_norm(x, shape, block.gain, block.bias, _LN_EPS), scale)
            h = F.linear(F.silu(F.linear(h, block.up, block.up_bias)), block.down, block.down_bias)
            x = torch.addcmul(x, gate, h)
        shift, scale = parts[-2:]
        return F.linear(torch.addcmul(shift, F.layer_norm(x, shape, eps=_LN_EPS), scale), *self.output)


class _HeadLaw:
    """What flow and diffusion heads share: conditions, guidance, counting.

    condition: [copies B W, C], [cond; uncond] rows under guidance; shape: (B, W); guidance: float, or float32 [B W], a
    scale per place; temperature: multiplies every deviation.
    """

    def __init__(
        self,
        head: PackedDenoiser,
        condition: Tensor,
        shape: tuple[int, int],
        guidance: float | Tensor,
        temperature: float,
    ):
        self.head, self.shape, self.temperature = head, shape, temperature
        self.steps, self.dim = head.steps, head.token_dim
        self.places = shape[0] * shape[1]
        self.copies = len(condition) // max(1, self.places)
        self.guidance = guidance
        self.condition = head.embed(condition)
        self.calls = self.rows = 0
        self.table: Tensor | None = None

    def predict(self, x: Tensor, step: Tensor, place: Tensor) -> Tensor:
        """ONE head call: x [R, D] -> guided predictions float32 [R, out_dim]; what lies beyond the first D numbers of a
        prediction (variances) is that of the conditional rows."""
        if self.table is None:
            steps = torch.arange(self.steps, device=x.device)
            self.table = self.head.modulations(self.condition, steps).flatten(0, 1)
        self.calls += 1
        self.rows += len(x) * self.copies
        row = step * (self.copies * self.places) + place
        if self.copies == 1:
            return self.head(x, self.table[row])
        row = torch.cat([row, row + self.places])
        cond, uncond = self.head(x.repeat(2, 1), self.table[row]).chunk(2)
        scale = self.guidance[place, None] if isinstance(self.guidance, Tensor) else self.guidance
        d = self.dim
        guided = uncond[:, :d] + (cond[:, :d] - uncond[:, :d]) * scale
        return guided if cond.shape[1] == d else torch.cat([guided, cond[:, d:]], 1)


class FlowLaw(_HeadLaw):
    """Laws of a flow head (`flow_schedule`): deviations are fixed."""

    isotropic = True

    def __init__(self, schedule: FlowSchedule, *args: object):
        super().__init__(*args)  # type: ignore[arg-type]
        self.coefficients = flow_coefficients(schedule, self.temperature, self.condition.device)
        self.ancestry = schedule.ancestry(self.condition.device)

    def std_later(self, std: Tensor, step: Tensor, later: Tensor) -> Tensor:
        return self.coefficients[later, 2, None]

    def kernel(self, x: Tensor, step: Tensor, place: Tensor) -> Gaussian:
        velocity = self.predict(x, step, place)
        of_state, of_velocity, std = self.coefficients[step].unsqueeze(-1).unbind(1)
        return Gaussian(torch.addcmul(of_state * x, of_velocity, velocity), std)


def flow_coefficients(schedule: FlowSchedule, temperature: float, device: torch.device) -> Tensor:
    """float32 [T, 3]: factor of the state, factor of the velocity, deviation."""
    parts = (schedule.of_state, schedule.of_velocity, schedule.std * temperature)
    return torch.stack(parts, 1).float().to(device)


class DiffusionLaw(_HeadLaw):
    """Laws of a diffusion head with learned variances (`diffusion_schedule`), as MAR samples it: the mean follows the
    guided noise, the variance the conditional rows; the last step adds no noise."""

    isotropic = False

    def __init__(self, schedule: DiffusionSchedule, *args: object):
        super().__init__(*args)  # type: ignore[arg-type]
        self.coefficients = diffusion_coefficients(schedule, self.condition.device)
        self.ancestry = schedule.ancestry(self.condition.device)

    def std_later(self, std: Tensor, step: Tensor, later: Tensor) -> Tensor:
        """With the same mix of the two bounds."""
        low, high = self.coefficients[step, 2:4].unsqueeze(-1).unbind(-2)  # [..., 1]
        mix = (2 * (std / self.temperature).log() - low) / (high - low).clamp_min(_LEAST_GAP)
        mix = torch.where(high - low > _LEAST_GAP, mix.clamp(0, 1), 0.5).unsqueeze(-2)
        low, high, moving = self.coefficients[later, 2:5].unsqueeze(-1).unbind(-2)
        return (0.5 * torch.lerp(low, high, mix)).exp() * (moving * self.temperature)

    def kernel(self, x: Tensor, step: Tensor, place: Tensor) -> Gaussian:
        noise, mix = self.predict(x, step, place).chunk(2, -1)
        of_state, of_noise, low, high, moving = self.coefficients[step].unsqueeze(-1).unbind(1)
        share = (mix + 1) / 2
        std = (0.5 * torch.lerp(low, high, share)).exp() * (moving * self.temperature)
        return Gaussian(torch.addcmul(of_state * x, of_noise, noise), std)


def diffusion_coefficients(schedule: DiffusionSchedule, device: torch.device) -> Tensor:
    """float32 [T, 5]: factors of the state and of the noise in the mean, bounds of the log variance, and 1, or 0 for
    the last step, which adds no noise."""
    of_state = schedule.of_token * schedule.recip + schedule.of_state
    of_noise = -schedule.of_token * schedule.recip_minus
    moving = torch.ones_like(of_state)
    moving[-1] = 0
    return torch.stack([of_state, of_noise, schedule.log_small, schedule.log_large, moving], 1).float().to(device)
