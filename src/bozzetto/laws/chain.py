"""The law of a continuous token: T Gaussian denoising steps from pure noise to the token.

State 0 is N(0, I), state T the token; step k takes state k to state k + 1. "Exact" for continuous tokens means: the
token has the law of this chain, with its schedule, its number of steps, its temperature and its last step as they are.
Densities are kept as logarithms in float32 and summed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Gaussian(NamedTuple):
    """mean [..., D]; std [..., D] or [..., 1], 0 where the step adds no noise."""

    mean: Tensor
    std: Tensor

    def at(self, noise: Tensor) -> Tensor:
        """mean + std noise, [..., D]."""
        return torch.addcmul(self.mean, self.std, noise)

    def rows(self, index: Tensor | tuple[Tensor, ...]) -> Gaussian:
        """The laws at an index of the leading dimensions."""
        return Gaussian(self.mean[index], self.std[index])


class Ancestry(NamedTuple):
    """What all chains of a sampler have in common, float32 [T] each: state k is signal x_0 + noise eps, and the mean of
    the next one is of_token E[x_0 | state] + of_state state."""

    signal: Tensor
    noise: Tensor
    of_token: Tensor
    of_state: Tensor


class ChainLaw(Protocol):
    """The laws of the tokens at R places, one chain each.

    steps: T; dim: D; shape: (B, W), the places are numbered b W + w; isotropic: the deviation of a step is one number
    above 0 that depends on the step only, the same for every law of this model; ancestry: the sampler; calls, rows:
    evaluations of the head so far (serial calls, and rows in them, guidance rows counted); own: whether our kernels
    run it.
    """

    steps: int
    dim: int
    shape: tuple[int, int]
    isotropic: bool
    ancestry: Ancestry
    calls: int
    rows: int
    own: bool = False

    def kernel(self, x: Tensor, step: Tensor, place: Tensor) -> Gaussian:
        """ONE call of the head: the laws of the next states. x float32 [R, D]; step int64 [R] in 0..T-1; place int64
        [R], numbers of places."""
        ...

    def all_places(self, x: Tensor, step: int) -> Gaussian:
        """`kernel` of one step at every place in turn: x float32 [B W, D]. (Laws that know more do it with less.)"""
        place = torch.arange(len(x), device=x.device)
        return self.kernel(x, torch.full_like(place, step), place)

    def run(self, noise: Tensor) -> Trajectory:
        """`sample_trajectory` of every place in turn."""
        return _run(lambda x, step: self.all_places(x, step), self.steps, noise)

    def reflected(self, draft: Trajectory, keys: Tensor) -> Trajectory | None:
        """Chains of every place in turn, each coupled by reflection with a draft's of the same deviations, as one
        call; None: nothing here does that. draft: [B, W - 1, ...]; keys: int64 [B, W], see `rules/chains.py`."""
        return None

    def std_later(self, std: Tensor, step: Tensor, later: Tensor) -> Tensor:
        """A guess of deviations at later steps, for drafts: std [R, D or 1], seen at step int64 [R]; later int64 [R, M]
        -> [R, M, D or 1]; the deviations themselves where `isotropic`."""
        ...


def log_density(x: Tensor, law: Gaussian) -> Tensor:
    """log N(x; mean, std^2), float64 [...]: x [..., D]; std > 0."""
    z = (x - law.mean) / law.std
    scale = law.std.log().expand_as(z)
    return -(0.5 * z.square() + scale).sum(-1, dtype=torch.float64) - 0.5 * x.shape[-1] * math.log(2 * math.pi)


def log_ratio(x: Tensor, top: Gaussian, bottom: Gaussian) -> Tensor:
    """log top(x) / bottom(x), float64 [...], for x drawn from `bottom`.

    A law without noise is a point: against a law with noise the ratio is 0 (its log -inf), against another point 1
    where x is both, else 0.
    """
    top_still, bottom_still = (top.std == 0).all(-1), (bottom.std == 0).all(-1)
    top_std = torch.where(top.std == 0, 1.0, top.std)
    bottom_std = torch.where(bottom.std == 0, 1.0, bottom.std)
    ratio = log_density(x, Gaussian(top.mean, top_std)) - log_density(x, Gaussian(bottom.mean, bottom_std))
    same = top_still & bottom_still & (x == top.mean).all(-1)
    return ratio.masked_fill(top_still | bottom_still, -torch.inf).masked_fill(same, 0.0)


class Trajectory(NamedTuple):
    """A sampled chain and the laws of its steps. states [..., T + 1, D]; mean [..., T, D]; std [..., T, D or 1]:
    states[k + 1] was drawn from N(mean[k], std[k]^2) given states[k]."""

    states: Tensor
    mean: Tensor
    std: Tensor

    @property
    def token(self) -> Tensor:
        """The last state, [..., D]."""
        return self.states[..., -1, :]

    def kernels(self) -> Gaussian:
        """All steps at once, [..., T, D]."""
        return Gaussian(self.mean, self.std)


def sample_trajectory(law: ChainLaw, place: Tensor | None, noise: Tensor) -> Trajectory:
    """Run the chains of the given places with the given noise: T serial calls of the head.

    place int64 [R], None: every place in turn; noise float32 [R, T + 1, D]: of state 0 and of each step. Returns
    trajectories [R, ...].
    """
    if place is None:
        return law.run(noise)
    return _run(lambda x, step: law.kernel(x, torch.full_like(place, step), place), law.steps, noise)


def _run(kernel_of: Callable[[Tensor, int], Gaussian], steps: int, noise: Tensor) -> Trajectory:
    by_step = noise.transpose(0, 1).contiguous()
    states, means, stds = [by_step[0]], [], []
    for k in range(steps):
        kernel = kernel_of(states[-1], k)
        states.append(kernel.at(by_step[k + 1]))
        means.append(kernel.mean)
        stds.append(kernel.std)
    return Trajectory(torch.stack(states, 1), torch.stack(means, 1), torch.stack(stds, 1))


def score_trajectory(law: ChainLaw, place: Tensor, states: Tensor) -> Gaussian:
    """The law's steps at given states: ONE call of the head with R T rows. place int64 [R]; states [R, T + 1, D] ->
    mean [R, T, D], std [R, T, D or 1]."""
    rows, steps = len(place), law.steps
    step = torch.arange(steps, device=place.device).repeat(rows)
    kernel = law.kernel(states[:, :-1].flatten(0, 1), step, place.repeat_interleave(steps))
    return Gaussian(*(part.unflatten(0, (rows, steps)) for part in kernel))
