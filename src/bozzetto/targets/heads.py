"""Denoising heads as laws: what laws/chain.py asks for, from a `Denoiser` and the backbone's conditions.

The modulations of a head (shift, scale, gate) depend on the step and on the condition but not on the noisy token, so
those of all steps and places of a pass are computed at once, in one wide product; a serial call of the head is left
with the narrow layers only. With a few rows and a small head these run in float32, which is the faster there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bozzetto.laws.chain import Ancestry, ChainLaw, Gaussian, Trajectory
from bozzetto.laws.schedules import DiffusionSchedule, FlowSchedule
from bozzetto.runtime.dense import Dense
from bozzetto.runtime.engine import LinearMap
from bozzetto.runtime.head import Coupled, NarrowLayers
from bozzetto.targets.denoiser import Denoiser, embed_times

LN_EPS = 1e-6
_LEAST_GAP = 1e-2  # between the bounds of a log variance, for the mix to be read off
# On a CPU float32 is the faster dtype of narrow layers up to this many rows and this width (measured).
_FEW_ROWS, _SMALL_WIDTH = 12, 512


def _narrow_layers(net: Denoiser, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """A denoiser's narrow layers in one dtype, called as `PackedDenoiser` is; tokens go in and predictions come out in
    float32."""
    width = net.config.width
    into, out = (Dense.of(part, torch.float32) for part in (net.input_proj, net.final_layer.linear))
    blocks: list[tuple[Tensor, Tensor, Dense, Dense]] = []  # gain and bias of the norm, the two linear maps
    for block in net.res_blocks:
        gain, bias = block.in_ln.weight.detach().to(dtype), block.in_ln.bias.detach().to(dtype)
        up, down = (Dense.of(layer, dtype) for layer in block.mlp[::2])
        blocks.append((gain, bias, up, down))

    def call(x: Tensor, modulation: Tensor) -> Tensor:
        parts = modulation.to(dtype).split(width, -1)
        x = into(x).to(dtype)  # copies of a token part in the first block
        for i, (gain, bias, up, down) in enumerate(blocks):
            shift, scale, gate = parts[3 * i : 3 * i + 3]
            h = torch.addcmul(shift, F.layer_norm(x, (width,), gain, bias, LN_EPS), scale)
            x = torch.addcmul(x, gate, down(up.silu(h)))
        shift, scale = parts[-2:]
        return out(torch.addcmul(shift, F.layer_norm(x, (width,), eps=LN_EPS), scale).float())

    return call


def narrow_layers(net: Denoiser, *maps: LinearMap) -> NarrowLayers:
    """The same by our kernels. maps: those that make modulations."""
    blocks = [(block.in_ln, *block.mlp[::2]) for block in net.res_blocks]
    return NarrowLayers(net.input_proj, net.final_layer.linear, blocks, *maps)


class PackedDenoiser:
    """A denoiser ready for decoding: modulations side by side, embeddings of the given times, narrow layers."""

    @torch.no_grad()
    def __init__(self, net: Denoiser, times: Tensor, dtype: torch.dtype, own: bool = False):
        """times: [T], what the network is told at each step of the sampler (0 to 1000); own: run by our kernels."""
        form: Any = LinearMap if own else Dense
        self.own = own
        self.width, self.depth, self.dtype = net.config.width, net.config.depth, dtype
        self.steps, self.token_dim, self.out_dim = len(times), net.config.token_dim, net.config.out_dim
        device = net.input_proj.weight.device
        self.embed_times = partial(embed_times, net.time_embed.mlp)
        self.times = self.embed_times(times.to(device)).to(dtype)  # [T, width]
        self.condition = form.of(net.cond_embed, dtype)
        parts = [block.adaLN_modulation[-1] for block in (*net.res_blocks, net.final_layer)]
        weight, bias = (torch.cat([getattr(p, name) for p in parts]).clone() for name in ("weight", "bias"))
        # Each block has shift, scale, gate, the last shift, scale; "1 + scale" becomes part of the bias.
        for start in (self.width * (3 * i + 1) for i in range(self.depth + 1)):
            bias[start : start + self.width] += 1
        self.modulation = form(weight, bias, dtype)  # [(3 depth + 2) width, width]
        self.narrow: Any = narrow_layers(net, self.condition, self.modulation) if own else _narrow_layers(net, dtype)
        self.few = self.narrow
        if not own and dtype != torch.float32 and device.type == "cpu" and self.width <= _SMALL_WIDTH:
            self.few = _narrow_layers(net, torch.float32)

    @torch.no_grad()
    def retimed(self, times: Tensor) -> PackedDenoiser:
        """The same head at other times [T]; weights are shared."""
        other = copy.copy(self)
        other.steps, other.times = len(times), self.embed_times(times.to(self.times.device)).to(self.dtype)
        return other

    def embed(self, condition: Tensor) -> Tensor:
        """Conditions [P, C] -> [P, width]."""
        return self.condition(condition.to(self.dtype))

    def modulations(self, condition: Tensor, steps: Tensor) -> Tensor:
        """Embedded conditions [P, width] at steps int64 [K] -> [K, P, (3 depth + 2) width]."""
        return self.modulation(F.silu(self.times[steps][:, None] + condition))

    def __call__(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x [R, D] under modulations [..., R, (3 depth + 2) width] -> predictions, float32 [..., R, out_dim]."""
        few = modulation.shape[:-1].numel() <= _FEW_ROWS
        return (self.few if few else self.narrow)(x, modulation)


class HeadLaw(ChainLaw):
    """What flow and diffusion heads share: conditions, guidance, counting.

    condition: [copies B W, C], [cond; uncond] rows under guidance; shape: (B, W); guidance: float, or float32 [B W], a
    scale per place; temperature: multiplies every deviation. A kind of head says what `coefficients` a step has, and
    which law they make of a prediction.
    """

    coefficients: Tensor  # [T, n]

    def __init__(
        self,
        head: PackedDenoiser,
        condition: Tensor,
        shape: tuple[int, int],
        guidance: float | Tensor,
        temperature: float,
    ):
        self.head, self.own, self.shape, self.temperature = head, head.own, shape, temperature
        self.steps, self.dim = head.steps, head.token_dim
        self.places = shape[0] * shape[1]
        self.copies = len(condition) // max(1, self.places)
        self.guidance = guidance
        self.condition = condition
        self.calls = self.rows = 0
        self.table: Tensor | None = None

    def modulations(self) -> Tensor:
        """Of all steps and places, in the head's dtype: [T, copies B W, ...]."""
        if self.table is None:
            told = self.head.embed(self.condition)
            self.table = self.head.modulations(told, torch.arange(self.steps, device=self.condition.device))
        return self.table

    def predict(self, x: Tensor, step: Tensor, place: Tensor) -> Tensor:
        """ONE head call: x [R, D] -> guided predictions float32 [R, out_dim]; what lies beyond the first D numbers of a
        prediction (variances) is that of the conditional rows."""
        row = step * (self.copies * self.places) + place
        if self.copies > 1:
            row = torch.cat([row, row + self.places])
        scale = self.guidance[place, None] if isinstance(self.guidance, Tensor) else self.guidance
        return self._call(self.head, x, self.modulations().flatten(0, 1)[row], scale)

    def predict_all(self, x: Tensor, step: int) -> Tensor:
        """The same for one step at every place in turn: x [B W, D]."""
        scale = self.guidance[:, None] if isinstance(self.guidance, Tensor) else self.guidance
        return self._call(self.head, x, self.modulations()[step], scale)

    def kernel(self, x: Tensor, step: Tensor, place: Tensor) -> Gaussian:
        return self._law(x, self.predict(x, step, place), self.coefficients[step].unsqueeze(-1).unbind(1))

    def all_places(self, x: Tensor, step: int) -> Gaussian:
        return self._law(x, self.predict_all(x, step), self.coefficients[step].unbind(0))

    def run(self, noise: Tensor) -> Trajectory:
        return self._whole(noise) if self.own else super().run(noise)

    def reflected(self, draft: Trajectory, keys: Tensor) -> Trajectory | None:
        if not (self.own and self.isotropic):
            return None
        return self._whole(None, Coupled(draft.states, draft.mean, keys))

    def _whole(self, noise: Tensor | None, draft: Coupled | None = None) -> Trajectory:
        """All steps of every place in turn as one call."""
        self.calls += self.steps
        self.rows += self.steps * self.copies * self.places
        scale = self.guidance if isinstance(self.guidance, Tensor) else torch.full((self.places,), float(self.guidance))
        given = self.condition, self.head.times, self.coefficients, scale, self.temperature
        return Trajectory(*self.head.narrow.chains(*given, noise, draft))

    def _law(self, x: Tensor, predicted: Tensor, coefficients: tuple[Tensor, ...]) -> Gaussian:
        """Of the next states, from the head's predictions at states x [R, D] and the coefficients of their steps."""
        raise NotImplementedError

    def _call(
        self, head: Callable[[Tensor, Tensor], Tensor], x: Tensor, modulation: Tensor, scale: float | Tensor
    ) -> Tensor:
        self.calls += 1
        self.rows += len(modulation)
        if self.copies == 1:
            return head(x, modulation)
        cond, uncond = head(x, modulation.unflatten(0, (2, -1))).unbind(0)
        d = self.dim
        if cond.shape[1] == d:
            return torch.lerp(uncond, cond, scale)
        return torch.cat([torch.lerp(uncond[:, :d], cond[:, :d], scale), cond[:, d:]], 1)


@lru_cache(maxsize=64)
def _ancestry(schedule: FlowSchedule | DiffusionSchedule, device: torch.device) -> Ancestry:
    return schedule.ancestry(device)


class FlowLaw(HeadLaw):
    """Laws of a flow head: deviations are fixed."""

    def __init__(self, schedule: FlowSchedule, *args: object):
        super().__init__(*args)  # type: ignore[arg-type]
        self.isotropic = schedule.moving
        self.coefficients = flow_coefficients(schedule, self.temperature, self.condition.device)
        self.ancestry = _ancestry(schedule, self.condition.device)

    def std_later(self, std: Tensor, step: Tensor, later: Tensor) -> Tensor:
        return self.coefficients[later, 2, None]

    def _law(self, x: Tensor, predicted: Tensor, coefficients: tuple[Tensor, ...]) -> Gaussian:
        of_state, of_velocity, std = coefficients
        return Gaussian(torch.addcmul(of_state * x, of_velocity, predicted), std.expand(len(x), 1))


@lru_cache(maxsize=64)
def flow_coefficients(schedule: FlowSchedule, temperature: float, device: torch.device) -> Tensor:
    """float32 [T, 3]: factor of the state, factor of the velocity, deviation."""
    parts = (schedule.of_state, schedule.of_velocity, schedule.std * temperature)
    return torch.stack(parts, 1).float().to(device)


class DiffusionLaw(HeadLaw):
    """Laws of a diffusion head with learned variances (`diffusion_schedule`), as MAR samples it: the mean follows the
    guided noise, the variance the conditional rows; the last step adds no noise."""

    isotropic = False

    def __init__(self, schedule: DiffusionSchedule, *args: object):
        super().__init__(*args)  # type: ignore[arg-type]
        self.coefficients = diffusion_coefficients(schedule, self.condition.device)
        self.ancestry = _ancestry(schedule, self.condition.device)

    def std_later(self, std: Tensor, step: Tensor, later: Tensor) -> Tensor:
        """With the same mix of the two bounds."""
        low, high = self.coefficients[step, 2:4].unsqueeze(-1).unbind(-2)  # [..., 1]
        mix = (2 * (std / self.temperature).log() - low) / (high - low).clamp_min(_LEAST_GAP)
        mix = torch.where(high - low > _LEAST_GAP, mix.clamp(0, 1), 0.5).unsqueeze(-2)
        low, high, moving = self.coefficients[later, 2:5].unsqueeze(-1).unbind(-2)
        return (0.5 * torch.lerp(low, high, mix)).exp() * (moving * self.temperature)

    def _law(self, x: Tensor, predicted: Tensor, coefficients: tuple[Tensor, ...]) -> Gaussian:
        noise, mix = predicted.chunk(2, -1)
        of_state, of_noise, low, high, moving = coefficients
        share = (mix + 1) / 2
        std = (0.5 * torch.lerp(low, high, share)).exp() * (moving * self.temperature)
        return Gaussian(torch.addcmul(of_state * x, of_noise, noise), std)


@lru_cache(maxsize=64)
def diffusion_coefficients(schedule: DiffusionSchedule, device: torch.device) -> Tensor:
    """float32 [T, 5]: factors of the state and of the noise in the mean, bounds of the log variance, and 1, or 0 for
    the last step, which adds no noise."""
    of_state = schedule.of_token * schedule.recip + schedule.of_state
    of_noise = -schedule.of_token * schedule.recip_minus
    moving = torch.ones_like(of_state)
    moving[-1] = 0
    return torch.stack([of_state, of_noise, schedule.log_small, schedule.log_large, moving], 1).float().to(device)
