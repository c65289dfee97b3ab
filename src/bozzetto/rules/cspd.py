"""Continuous speculative decoding (CSpD), as published and as released. Not lossless.

Wang et al., arXiv 2411.11925. Draft and target denoise every token with the same noise ("trajectory alignment"), each
along its own path. With x_0 the drafted token, x_1 the states before it and Sigma the product of draft deviations over
target deviations of all steps but the last, a draft is kept with probability

    min(1, Sigma N(x_0; mu_p(x_1^p), sigma_p^2) / N(x_0; mu_q(x_1^q), sigma_q^2)),

and a rejected one is drawn again from N(mu_p(x_1^p), sigma_p^2), a candidate x surviving with probability
(1 - q(x) / (Sigma p(x)))_+. Without Sigma this is a maximal coupling of the two last steps, which is exact; with it
target mass is weighted by a number that has nothing to do with the token.

The released code differs: Sigma is inverted, the two deviations of the test (not those of the redraw) are multiplied by
an inner temperature of 42, and a rejected token is replaced in place while the drafts behind it, made from it, are
kept. There the target also sees none of the drafts; for a masked model that is the business of the decode loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bozzetto.drafts import VECTORS, Draft, Verdict
from bozzetto.errors import UsageError, require
from bozzetto.laws.chain import ChainLaw, Gaussian, Trajectory, log_density, sample_trajectory
from bozzetto.laws.noise import fold, normal, uniform
from bozzetto.rules.base import Noise, Rule, given, leading
from bozzetto.runtime.head import own_cspd

_INNER = {"paper": 1.0, "released": 42.0}  # inner temperatures


@dataclass(frozen=True)
class Cspd(Rule):
    """variant: `paper` ends a window at the first rejection; `released` replaces rejected tokens in place and counts
    the whole window as accepted. inner_temperature: 0 is the variant's own, 1 or 42; tries: candidates of a redraw,
    after which the target's own sample from the shared noise is taken; last_std: deviation of the last step where the
    sampler itself adds no noise there (the default is that of a 100-step cosine sampler)."""

    name: ClassVar[str] = "cspd"
    about: ClassVar[str] = (
        "Continuous speculative decoding as published; what it draws has no bound to the model's law."
    )
    tokens: ClassVar[str] = VECTORS
    fixed_noise: ClassVar[bool] = True
    needs_fixed: ClassVar[bool] = True
    masked: ClassVar[bool] = True
    bias: ClassVar[str] = (
        "no bound: the test weighs the target by a ratio of deviations that the redraw does not undo, and `released` "
        "keeps tokens drafted after a rejected one; the distance to the target's own sample is recorded"
    )

    variant: str = "paper"
    inner_temperature: float = 0.0
    tries: int = 100
    last_std: float = 0.0064

    def __post_init__(self) -> None:
        if self.variant not in _INNER:
            raise UsageError(f"variant = {self.variant} is not allowed: paper or released")
        heat = self.inner_temperature
        require(0 <= heat < math.inf, "inner_temperature", heat, "a number >= 0")
        require(self.tries >= 0, "tries", self.tries, "a whole number >= 0")
        require(0 < self.last_std < math.inf, "last_std", self.last_std, "a number > 0")

    @property
    def blind(self) -> bool:  # type: ignore[override]
        """As released."""
        return self.variant == "released"

    def verify(self, draft: Draft, law: ChainLaw, noise: Noise) -> Verdict:
        batch, length = draft.tokens.shape[:2]
        fixed, keys = given(noise.fixed, self, "fixed noise"), given(noise.keys, self, "fresh keys")
        aligned = sample_trajectory(law, None, fixed.flatten(0, 1))
        aligned = Trajectory(*(part.unflatten(0, (batch, length + 1)) for part in aligned))
        tokens, accepted = aligned.token.clone(), torch.zeros_like(keys[:, 0])
        drafted = given(draft.trajectory, self, "the drafts' paths") if length else None
        if law.own and drafted is not None:
            heat = self.inner_temperature or _INNER[self.variant]
            tokens, accepted = own_cspd(aligned, drafted, keys, self.blind, heat, self.tries, self.last_std)
        elif drafted is not None:
            target = Trajectory(*(part[:, :length] for part in aligned))
            sigma = self.log_sigma(drafted, target)
            p, q = self._last(target), self._last(drafted)
            keep = uniform(fold(keys[:, :length], 0)).log() < self.log_ratio(draft.tokens, p, q, sigma)
            accepted = leading(keep)
            if self.variant == "released":
                kept, redrawn = keep, ~keep
                accepted = torch.full_like(accepted, length)
            else:
                column = torch.arange(length, device=tokens.device)
                kept, redrawn = column < accepted[:, None], column == accepted[:, None]
            at = redrawn.nonzero(as_tuple=True)
            mine = tokens[:, :length]
            mine[at] = self._redraw(p.rows(at), q.rows(at), sigma[at], keys[at], mine[at])
            mine[kept] = draft.tokens[kept]
        return Verdict(tokens, accepted, distance=(tokens - aligned.token).abs().amax(-1))

    def log_sigma(self, draft: Trajectory, target: Trajectory) -> Tensor:
        """log of the product of deviations, float64 [...]: draft over target in the paper, target over draft in the
        code; steps without noise count as 1."""

        def total(path: Trajectory) -> Tensor:
            std = path.std[..., :-1, :].double().expand_as(path.mean[..., :-1, :])
            return torch.where(std > 0, std, 1.0).log().sum((-1, -2))

        sigma = total(draft) - total(target)
        return -sigma if self.variant == "released" else sigma

    def log_ratio(self, x: Tensor, p: Gaussian, q: Gaussian, log_sigma: Tensor) -> Tensor:
        """log of Sigma p(x) / q(x) at the inner temperature, float64 [...]."""
        heat = self.inner_temperature or _INNER[self.variant]
        p, q = Gaussian(p.mean, p.std * heat), Gaussian(q.mean, q.std * heat)
        return log_sigma + log_density(x, p) - log_density(x, q)

    def _last(self, path: Trajectory) -> Gaussian:
        """The last step's law, with noise."""
        std = path.std[..., -1, :]
        return Gaussian(path.mean[..., -1, :], torch.where(std > 0, std, self.last_std))

    def _redraw(self, p: Gaussian, q: Gaussian, log_sigma: Tensor, keys: Tensor, own: Tensor) -> Tensor:
        """Tokens [R, D] after a rejection; own: what the target drew from the shared noise."""
        out, left = own.clone(), torch.arange(len(keys), device=keys.device)
        dims = torch.arange(own.shape[-1], device=keys.device)
        for attempt in range(1, self.tries + 1):
            if not len(left):
                break
            key, law, other = fold(keys[left], attempt), p.rows(left), q.rows(left)
            x = law.at(normal(fold(fold(key, 1)[:, None], dims)))
            log_q_p = log_density(x, other) - log_sigma[left] - log_density(x, law)
            survives = uniform(fold(key, 0)).log() > log_q_p
            out[left[survives]] = x[survives]
            left = left[~survives]
        return out
