"""Chains in closed form: a token drawn from N(centre, spread^2), diagonal, noised and denoised without any network.

The posterior mean of such a token given a state is linear in the state, so every step of its ancestral chain is known.
A draft may be any law; this one costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bozzetto.laws.chain import Ancestry, Gaussian


class GaussianChain:
    """Laws of the tokens at R places. centre, spread: float32 [R, D], spread > 0; ancestry and std (float32 [T]): the
    target's sampler, whose deviations must be fixed (laws of flow heads)."""

    isotropic = True

    def __init__(self, centre: Tensor, spread: Tensor, ancestry: Ancestry, std: Tensor, shape: tuple[int, int]):
        self.centre, self.variance, self.ancestry, self.std, self.shape = centre, spread.square(), ancestry, std, shape
        self.steps, self.dim = len(std), centre.shape[-1]
        self.calls = self.rows = 0  # no head

    def token(self, x: Tensor, step: Tensor, place: Tensor) -> Tensor:
        """E[token | state x], [R', D]: x [R', D], step and place int64 [R']."""
        a, variance, centre = self.ancestry, self.variance[place], self.centre[place]
        signal, noise = a.signal[step][:, None], a.noise[step][:, None]
        gain = signal * variance / (signal.square() * variance + noise.square())
        return torch.addcmul(centre, gain, x - signal * centre)

    def kernel(self, x: Tensor, step: Tensor, place: Tensor) -> Gaussian:
        return Gaussian(self.ancestry.mean_of(self.token(x, step, place), x, step), self.std[step][:, None])

    def std_later(self, std: Tensor, step: Tensor, later: Tensor) -> Tensor:
        return self.std[later][..., None]
