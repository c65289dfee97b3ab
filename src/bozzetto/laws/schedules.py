"""The law of a continuous token: a chain of Gaussian denoising steps, as a table of coefficients.

State 0 is pure noise N(0, I), state T is the token; step k takes state k to state k + 1 by a Gaussian whose mean is
linear in the state and in the head's prediction. The samplers:

- `flow_schedule`: the ancestral sampler of the straight path x_t = t x_1 + (1 - t) x_0 (the posterior of x_s given x_t
  and the predicted x_1, as in DDIM with eta = 1, Song et al., arXiv 2010.02502, eq. 16). Its deviations are fixed and
  the same in every direction. The posterior of the last step has deviation 0; here it is `last_std`, so that every step
  has a density.
- `euler_schedule`, `flow_sde_schedule`: two samplers of the same path that NextStep-1 was published with.
- `diffusion_schedule`: the ancestral sampler of a cosine diffusion with learned variances (Nichol and Dhariwal, arXiv
  2102.09672) on a subset of its 1000 times, as MAR uses it. Its last step adds no noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from bozzetto.errors import require
from bozzetto.laws.chain import Ancestry

_TRAINED = 1000  # diffusion times
_LARGEST_BETA = 0.999


@dataclass(frozen=True, eq=False)
class FlowSchedule:
    """time: float64 [T], path time of state k; of_state, of_velocity: float64 [T], mean = of_state x + of_velocity v;
    std: float64 [T], deviation of step k."""

    time: Tensor
    of_state: Tensor
    of_velocity: Tensor
    std: Tensor

    @property
    def steps(self) -> int:
        """Steps of the chain, T."""
        return len(self.time)

    @cached_property
    def moving(self) -> bool:
        """Whether every step adds noise, so that every step has a density."""
        return bool((self.std > 0).all())

    def ancestry(self, device: torch.device) -> Ancestry:
        """The sampler in terms of E[x_1 | state]: v = (E[x_1 | x] - x) / (1 - t)."""
        per_token = self.of_velocity / (1 - self.time)
        parts = (self.time, 1 - self.time, per_token, self.of_state - per_token)
        return Ancestry(*(part.float().to(device) for part in parts))


def flow_schedule(steps: int, last_std: float = 0.05, shift: float = 1.0) -> FlowSchedule:
    """Ancestral flow sampler with `steps` steps. last_std: deviation of the last one, in token units; shift: times are
    u / (u + shift (1 - u)) of a uniform grid u (above 1: more steps near the noise).

    Raises UsageError for values out of range.
    """
    require(0 < last_std < 1, "last_std", last_std, "a number between 0 and 1")
    grid = _grid(steps, shift)
    t, s = grid[:-1], grid[1:]
    kept = (1 - s) ** 2 * t / (s * (1 - t))  # the share of the old noise that stays
    std = ((1 - s) ** 2 - kept**2).clamp_min(0).sqrt()
    std[-1] = last_std
    return FlowSchedule(t, s + kept, s * (1 - t) - kept * t, std)


def euler_schedule(steps: int, shift: float = 1.0, last: float = 0.0) -> FlowSchedule:
    """Euler and Maruyama's steps of dx = (v + (1 - t) s) dt + (2 (1 - t))^(1/2) dW, whose states have the path's law at
    all times; s = (t v - x) / (1 - t) is the score, so that the drift is (1 + t) v - x.

    last: 0: all steps are such, also the one that ends at time 1; else the grid ends at 1 - last before it is shifted,
    and the last step is last * v without noise, whatever time is left. Raises UsageError for values out of range.
    """
    require(0 <= last < 1, "last", last, "a number >= 0 and < 1")
    grid = _grid(steps - 1, shift, 1 - last) if last and steps > 1 else _grid(steps, shift)
    t, dt = grid[:steps], grid.diff()
    if last:
        dt = torch.cat([dt[: steps - 1], dt.new_tensor([last])])
    of_state, of_velocity, std = 1 - dt, (1 + t) * dt, (2 * (1 - t) * dt).sqrt()
    if last:
        of_state[-1], of_velocity[-1], std[-1] = 1.0, last, 0.0
    return FlowSchedule(t, of_state, of_velocity, std)


def flow_sde_schedule(steps: int, shift: float = 1.0, level: float = 0.8) -> FlowSchedule:
    """Flow-GRPO's sampler (Liu et al., arXiv 2505.05470): the step from time t has noise level ((1 - t) dt / t)^(1/2);
    at t = 0, where that is infinite, the length of the grid's last step stands in for t, as NextStep-1.1 has it.

    With predicted noise x_0 and token x_1, the mean at t + dt is (1 - t - dt - level^2 dt / (2 t)) x_0 + (t + dt) x_1.
    Raises UsageError for values out of range.
    """
    require(0 < level <= 1, "level", level, "a number > 0, at most 1")
    grid = _grid(steps, shift)
    t, s, dt = grid[:-1], grid[1:], grid.diff()
    held = torch.where(t == 0, 1 - grid[-2], t)
    of_noise = 1 - s - level**2 * dt / (2 * held)
    std = level * ((1 - t) * dt / held).sqrt()
    return FlowSchedule(t, of_noise + s, s * (1 - t) - of_noise * t, std)


def _grid(steps: int, shift: float, end: float = 1.0) -> Tensor:
    """Times u / (u + shift (1 - u)) of `steps` equal parts u of [0, end]: float64 [steps + 1]."""
    require(steps >= 1, "steps", steps, "a whole number >= 1")
    require(0 < shift < math.inf, "shift", shift, "a number > 0")
    u = torch.linspace(0, end, steps + 1, dtype=torch.float64)
    return u / (u + shift * (1 - u))


@dataclass(frozen=True, eq=False)
class DiffusionSchedule:
    """Step k = 0..T-1 runs from the noisiest time down. time: float64 [T], what the head is told (0..999); recip,
    recip_minus: float64 [T], x_0 = recip x - recip_minus eps; of_token, of_state: float64 [T], posterior mean =
    of_token x_0 + of_state x; log_small, log_large: float64 [T], bounds of the log variance."""

    time: Tensor
    recip: Tensor
    recip_minus: Tensor
    of_token: Tensor
    of_state: Tensor
    log_small: Tensor
    log_large: Tensor

    @property
    def steps(self) -> int:
        """Steps of the chain, T."""
        return len(self.time)

    def ancestry(self, device: torch.device) -> Ancestry:
        """The sampler in terms of E[x_0 | state]."""
        signal = 1 / self.recip
        parts = (signal, (1 - signal**2).sqrt(), self.of_token, self.of_state)
        return Ancestry(*(part.float().to(device) for part in parts))


def _cosine_products() -> Tensor:
    """Cumulative products of 1 - beta of the cosine schedule, float64 [1000]."""
    at = torch.arange(_TRAINED + 1, dtype=torch.float64) / _TRAINED
    level = ((at + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    betas = (1 - level[1:] / level[:-1]).clamp_max(_LARGEST_BETA)
    return (1 - betas).cumprod(0)


def _spaced(steps: int, noisiest: int) -> Tensor:
    """`steps` times, evenly from 0 to `noisiest`, rounded: int64 [steps]."""
    require(0 <= noisiest < _TRAINED, "noisiest", noisiest, f"a whole number from 0 to {_TRAINED - 1}")
    require(1 <= steps <= noisiest + 1, "steps", steps, f"a whole number from 1 to {noisiest + 1}")
    if steps == 1:
        return torch.tensor([noisiest])
    stride = noisiest / (steps - 1)
    return torch.tensor([round(stride * i) for i in range(steps)])


def diffusion_schedule(steps: int, noisiest: int = _TRAINED - 1) -> DiffusionSchedule:
    """The cosine diffusion's sampler on `steps` of its times, the noisiest of them `noisiest`.

    Published models start at time 999, where signal and noise have the ratio 1 to 20000: the first step multiplies
    every error of the head by 316. A model may start a little later; its pure noise is then a state whose small signal
    is left out. Raises UsageError for a count or a time out of range.
    """
    times = _spaced(steps, noisiest)
    product = _cosine_products()[times]
    before = torch.cat([torch.ones(1, dtype=torch.float64), product[:-1]])
    beta = 1 - product / before
    small = beta * (1 - before) / (1 - product)
    if steps > 1:
        small[0] = small[1]  # the first is zero
    else:
        small = beta
    table = DiffusionSchedule(
        time=times.double(),
        recip=product.rsqrt(),
        recip_minus=(1 / product - 1).sqrt(),
        of_token=beta * before.sqrt() / (1 - product),
        of_state=(1 - before) * (1 - beta).sqrt() / (1 - product),
        log_small=small.log(),
        log_large=beta.log(),
    )
    return DiffusionSchedule(**{name: value.flip(0) for name, value in vars(table).items()})


@lru_cache
def noised_tables() -> tuple[Tensor, ...]:
    """What training needs of the cosine diffusion, by time, float32 [1000] each: signal and noise, x_t = signal x_0 +
    noise eps; how the posterior mean follows the predicted noise; the lower and upper bound of the log variance."""
    schedule = diffusion_schedule(_TRAINED)
    product = _cosine_products()
    of_noise = (schedule.of_token * schedule.recip_minus).flip(0)
    tables = (product.sqrt(), (1 - product).sqrt(), of_noise, schedule.log_small.flip(0), schedule.log_large.flip(0))
    return tuple(table.float() for table in tables)
