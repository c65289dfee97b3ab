"""Block verification over the denoising steps of each drafted token. Exact.

With r_i the density ratio target : draft of step i, the weights w_0 = 1, w_i = min(1, w_{i-1} r_i) run along a drafted
path. From its end down, the first i steps are kept with probability w_T at i = T and S_i / (S_i + 1 - w_i) below, where
S_i = int [w_i p(. | X_i) - q(. | X_i)]+; the state after the kept steps has law norm([w_i p - q]+), and the target's
head goes on from there. No rule that decides this way keeps more steps on average. (Sun et al., arXiv 2403.10444; on
denoising steps Soen et al., arXiv 2606.13426.)

A token is accepted where its whole path is. At the first that is not, part of its path is saved still; later drafts are
dropped. Steps with equal fixed deviations have S_i and the residual in closed form; for others a Bernoulli race needs
densities only (rules/coupling.py). Neither calls a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bozzetto.drafts import VECTORS, Draft, Verdict
from bozzetto.errors import UsageError
from bozzetto.laws.chain import ChainLaw, Gaussian, log_ratio, score_trajectory
from bozzetto.laws.noise import fold, fresh_noise, uniform
from bozzetto.rules.base import Noise, Rule, given, leading
from bozzetto.rules.coupling import MOST_TRIES, excess, excess_draw, race_round


@dataclass(frozen=True)
class PathBlock(Rule):
    """Block verification of denoising paths; no parameters."""

    name: ClassVar[str] = "block"
    about: ClassVar[str] = (
        "Keeps as much of a token's denoising path as pays, the path taken as a whole; the model's own law."
    )
    tokens: ClassVar[str] = VECTORS
    exact: ClassVar[bool] = True

    def verify(self, draft: Draft, law: ChainLaw, noise: Noise) -> Verdict:
        (batch, length), keys = draft.tokens.shape[:2], given(noise.keys, self, "fresh keys")
        device = keys.device
        images = torch.arange(batch, device=device)
        accepted = torch.zeros_like(images)
        rejected = images[:0]
        if length:
            drafted = given(draft.trajectory, self, "the drafts' paths")
            place = images[:, None] * (length + 1) + torch.arange(length, device=device)
            scored = score_trajectory(law, place.flatten(), drafted.states.flatten(0, 1))
            target = Gaussian(*(part.unflatten(0, (batch, -1)) for part in scored))
            log_w = weights(log_ratio(drafted.states[:, :, 1:], target, drafted.kernels()))
            accepted = leading(uniform(fold(keys[:, :length], 0)).log() < log_w[..., -1])
            rejected = (accepted < length).nonzero()[:, 0]
        key = keys.gather(1, accepted[:, None])[:, 0]
        fresh = fresh_noise(fold(key, 1), law.steps, law.dim)
        x, step = fresh[:, 0].clone(), torch.zeros_like(images)
        if len(rejected):
            at = (rejected, accepted[rejected])
            broken = (drafted.kernels().rows(at), target.rows(at), log_w[at], key[rejected])
            equal = law.isotropic and bool((broken[0].std == broken[1].std).all())
            kept, x[rejected] = _closed(*broken) if equal else _raced(*broken)
            step[rejected] = kept + 1
        own = finish(law, images * (length + 1) + accepted, x, step, fresh)
        tokens = torch.cat([draft.tokens, own[:, None]], 1)
        tokens[images, accepted] = own
        return Verdict(tokens, accepted)


def _closed(draft: Gaussian, target: Gaussian, log_w: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Of the first not fully accepted path of R images, laws of its steps [R, T, ...], log_w float64 [R, T + 1], keys
    int64 [R]: the last kept state's index int64 [R] and the next state [R, D]. Equal deviations: without trial and
    error."""
    log_w = log_w[:, :-1]
    delta = ((target.mean - draft.mean).double() / target.std.double()).norm(dim=-1)
    mass = excess(log_w, delta)
    steps = torch.arange(log_w.shape[1], device=log_w.device)
    u = uniform(fold(fold(keys, 2)[:, None], steps))
    # Whatever is left at the start is kept there: w_0 = 1.
    kept = torch.where(u * (mass - log_w.expm1()) < mass, steps, 0).amax(1)
    at = (torch.arange(len(kept), device=kept.device), kept)
    return kept, excess_draw(log_w[at], draft.mean[at], target.rows(at), fold(keys, 3))


def _raced(draft: Gaussian, target: Gaussian, log_w: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The same for any diagonal Gaussians. Raises UsageError where a race does not end, which finite densities cannot
    cause."""
    steps = target.mean.shape[1]
    level, x = torch.full_like(keys, steps - 1), torch.empty_like(target.mean[:, 0])
    left = torch.arange(len(level), device=level.device)
    for attempt in range(MOST_TRIES + steps):
        at = (left, level[left])
        won, lost, y = race_round(log_w[at], draft.rows(at), target.rows(at), fold(fold(keys[left], 2), attempt))
        x[left[won]] = y[won]
        level[left] = (level[left] - lost.long()).clamp_min(0)
        left = left[~won]
        if not len(left):
            return level, x
    raise UsageError(f"a race did not end after {MOST_TRIES + steps} rounds: the laws of a step are not finite")


def weights(log_r: Tensor) -> Tensor:
    """log w_i of log ratios float64 [..., T] -> [..., T + 1]: w_0 = 1, w_i = min(1, w_{i-1} r_i)."""
    total = torch.nn.functional.pad(log_r.cumsum(-1), (1, 0))
    return total - total.cummax(-1).values  # a walk that may not rise above its start


def finish(law: ChainLaw, place: Tensor, x: Tensor, step: Tensor, noise: Tensor) -> Tensor:
    """Run chains on from states x [R, D] that stand before steps int64 [R] (T: they are done) -> tokens [R, D].

    place int64 [R]; noise float32 [R, T + 1, D]: entry k + 1 is that of step k. As many serial head calls as the
    longest needs: later starters join when it comes to their step.
    """
    order = step.argsort(stable=True)
    joined = (step[:, None] <= torch.arange(law.steps, device=step.device)).sum(0).tolist()
    place, x, noise = place[order], x[order], noise[order]
    for k, count in enumerate(joined):
        if count:
            kernel = law.kernel(x[:count], torch.full_like(place[:count], k), place[:count])
            x[:count] = kernel.at(noise[:count, k + 1])
    return torch.empty_like(x).index_copy_(0, order, x)
