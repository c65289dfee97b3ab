"""Chains in closed form: a token drawn from N(centre, spread^2), diagonal, noised and denoised without any network.

The posterior mean of such a token given a state is linear in the state, so every step of its ancestral chain is known.
A draft may be any law; these cost next to nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bozzetto.laws.chain import Ancestry, ChainLaw, Gaussian, Trajectory


def gaussian_tables(centre: Tensor, variance: Tensor, ancestry: Ancestry) -> tuple[Tensor, Tensor]:
    """Of the chain of N(centre, variance), float32 [..., D] each: gain and offset, [T, ..., D]; the mean of step k is
    gain[k] x + offset[k]."""
    shape = (-1, *[1] * centre.ndim)
    a = Ancestry(*(part.view(shape) for part in ancestry))
    of_state = a.signal * variance / (a.signal.square() * variance + a.noise.square())  # of the posterior mean
    return a.of_token * of_state + a.of_state, a.of_token * (1 - of_state * a.signal) * centre


class AffineChain(ChainLaw):
    """Laws of the tokens at R places whose means are linear in the state.

    gain, offset: float32 [T, R, D]; ancestry and std (float32 [T]): the target's sampler, whose deviations must be
    fixed (laws of flow heads); basis: float32 [D, D], orthogonal, the axes along which gain and offset are meant (None:
    those of the token): mean = ((x basis^T) gain + offset) basis.
    """

    isotropic = True

    def __init__(
        self,
        gain: Tensor,
        offset: Tensor,
        ancestry: Ancestry,
        std: Tensor,
        shape: tuple[int, int],
        basis: Tensor | None = None,
    ):
        self.gain, self.offset, self.basis = gain, offset, basis
        self.ancestry, self.std, self.shape = ancestry, std, shape
        self.steps, self.dim = len(std), gain.shape[-1]
        self.calls = self.rows = 0  # no head

    def _turned(self, x: Tensor) -> Tensor:
        return x if self.basis is None else x @ self.basis.T

    def _back(self, x: Tensor) -> Tensor:
        return x if self.basis is None else x @ self.basis

    def kernel(self, x: Tensor, step: Tensor, place: Tensor) -> Gaussian:
        mean = torch.addcmul(self.offset[step, place], self.gain[step, place], self._turned(x))
        return Gaussian(self._back(mean), self.std[step][:, None])

    def all_places(self, x: Tensor, step: int) -> Gaussian:
        mean = torch.addcmul(self.offset[step], self.gain[step], self._turned(x))
        return Gaussian(self._back(mean), self.std[step].expand(len(x), 1))

    def std_later(self, std: Tensor, step: Tensor, later: Tensor) -> Tensor:
        return self.std[later][..., None]

    def sample(self, noise: Tensor) -> Trajectory:
        """What `sample_trajectory` gives for all places, with fewer operations: noise float32 [R, T + 1, D]."""
        turned = self._turned(noise).transpose(0, 1)
        moved = turned[1:] * self.std[:, None, None]
        x, states, means = turned[0], [turned[0]], []
        for gain, offset, more in zip(self.gain, self.offset, moved, strict=True):
            means.append(torch.addcmul(offset, gain, x))
            x = means[-1] + more
            states.append(x)
        std = self.std[:, None].expand(len(noise), -1, 1)
        return Trajectory(self._back(torch.stack(states, 1)), self._back(torch.stack(means, 1)), std)


def gaussian_chain(
    centre: Tensor, spread: Tensor, ancestry: Ancestry, std: Tensor, shape: tuple[int, int]
) -> AffineChain:
    """The chain of N(centre, spread^2) at R places. centre, spread: float32 [R, D], spread > 0; the rest as above."""
    return AffineChain(*gaussian_tables(centre, spread.square(), ancestry), ancestry, std, shape)
