"""Speculation inside one token: the next M denoising steps are drafted from the last prediction of the head, ONE
batched head call checks them all, and a coupling repairs the first that fails. Exact, without a drafter.

Frozen-drift drafts: De Bortoli et al., arXiv 2501.05370. There the last prediction itself is carried on; here it is
carried on as if the token's law were Gaussian with deviation `spread` (0: the predicted token is frozen): the predicted
token then follows the state as the posterior mean of that Gaussian does. Any function of the past may be a draft, so
this changes how often drafts are kept and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from bozzetto.drafts import VECTORS, Draft, Verdict
from bozzetto.errors import UsageError, require
from bozzetto.laws.chain import ChainLaw, Gaussian, log_ratio, sample_trajectory
from bozzetto.laws.noise import fold, uniform
from bozzetto.rules.base import Noise, Rule, given, leading
from bozzetto.rules.coupling import redraw, reflect

WIDEST = 100  # deviation of a token, in token units: far beyond what any model draws, and squares of it are numbers


@dataclass
class _Rows:
    """Chains in progress. place: int64 [R], which law; x: float32 [R, D] at
    state index k int64 [R]; centre [R, D]: mean of the Gaussian that stands for the token's law; std [R, D or 1],
    std_step: the deviation last seen and its step; noise [R, T + 1, D]; keys int64 [R]; log_u float64 [R, T]: of the
    tests, by step."""

    place: Tensor
    x: Tensor
    k: Tensor
    centre: Tensor
    std: Tensor
    std_step: Tensor
    noise: Tensor
    keys: Tensor
    log_u: Tensor

    def keep(self, rows: Tensor) -> _Rows:
        return _Rows(**{name: value[rows] for name, value in vars(self).items()})


def drafted_steps(law: ChainLaw, depth: int, spread: float, noise: Tensor, keys: Tensor) -> Tensor:
    """Tokens float32 [R, D] of all R places of a law, their chains sampled with drafted steps. depth: drafted steps per
    head call, M; spread: see above; noise float32 [R, T + 1, D]: of state 0 and of each step; keys int64 [R]: what the
    couplings' own randomness is made of."""
    place, a = torch.arange(len(keys), device=keys.device), law.ancestry
    # Posterior mean of a token N(m, s^2) given a state x: m + gain (x - signal m). So the step's mean is linear in the
    # state and in m.
    gain = a.signal * spread**2 / (a.signal.square() * spread**2 + a.noise.square())  # [T]
    of_x, of_centre = a.of_token * gain + a.of_state, a.of_token * (1 - gain * a.signal)
    linear = torch.stack([of_x, of_centre], -1)[..., None]  # [T, 2, 1]
    # The centre from the step's mean and the state, the same equation solved for m.
    solved = torch.stack([1 / of_centre, -of_x / of_centre], -1)[..., None]
    zeros, start = torch.zeros_like(place), noise[:, 0]
    centre, std = torch.zeros_like(start), torch.ones_like(start[:, :1])
    steps = fold(keys[:, None], torch.arange(law.steps, device=keys.device))
    log_u = uniform(fold(steps, 0)).log()
    rows = _Rows(place, start, zeros, centre, std, zeros, noise, keys, log_u)
    out = torch.empty_like(start)
    while len(rows.place):
        rows = _round(law, depth, linear, solved, rows)
        going = (rows.k < law.steps).nonzero()[:, 0]
        if len(going) < len(rows.place):
            out[rows.place] = rows.x  # those in progress are written again later
            rows = rows.keep(going)
    return out


def _draft(law: ChainLaw, linear: Tensor, rows: _Rows, step: Tensor, fresh: Tensor) -> tuple[Tensor, Gaussian]:
    """States float32 [R, M + 1, D] from the present one on, and the laws [R, M, ...] they were drawn from. linear: how
    the mean of a step follows state and centre, [T, 2, 1]; step int64 [R, M + 1]: the steps that start there; fresh
    [R, M + 1, D]: their noise."""
    states, means = [rows.x], []
    stds = law.std_later(rows.std, rows.std_step, step[:, :-1])
    of_x, of_centre = linear[step].unbind(2)  # [R, M + 1, 1]
    fixed, moved = of_centre * rows.centre[:, None], stds * fresh[:, :-1]
    for j in range(step.shape[1] - 1):
        means.append(torch.addcmul(fixed[:, j], of_x[:, j], states[-1]))
        states.append(means[-1] + moved[:, j])
    return torch.stack(states, 1), Gaussian(torch.stack(means, 1), stds)


def _round(law: ChainLaw, depth: int, linear: Tensor, solved: Tensor, rows: _Rows) -> _Rows:
    """Draft M steps, check them in one head call, go on to the first that fails, or one step past the last."""
    row = torch.arange(len(rows.place), device=rows.k.device)
    offset = torch.arange(depth + 1, device=rows.k.device)
    step = (rows.k[:, None] + offset).clamp_max(law.steps - 1)  # [R, M + 1]; what is past the end is not used
    fresh = rows.noise[row[:, None], step + 1]
    states, drafted = _draft(law, linear, rows, step, fresh)
    scored = law.kernel(states.flatten(0, 1), step.flatten(), rows.place.repeat_interleave(depth + 1))
    target = Gaussian(*(part.unflatten(0, step.shape) for part in scored))
    head = Gaussian(target.mean[:, :-1], target.std[:, :-1])
    log_u = rows.log_u[row[:, None], step[:, :-1]]
    if law.isotropic:
        coupled, kept = reflect(fresh[:, :-1], drafted.mean, head, log_u)
    else:
        coupled, kept = states[:, 1:], log_u <= log_ratio(states[:, 1:], head, drafted)
        kept &= (head.std > 0).all(-1)  # a step without noise is repaired: its mean is the state
    accepted = torch.minimum(leading(kept), (law.steps - 1 - rows.k).clamp_max(depth))
    at, failed = accepted.clamp_max(depth - 1), accepted < depth
    here = (row, accepted)
    taken, seen, seen_step = Gaussian(target.mean[here], target.std[here]), states[here], step[here]
    repaired = coupled[row, at]
    if not law.isotropic:
        draft = Gaussian(drafted.mean[row, at], drafted.std[row, at])
        repaired = _repair(taken, draft, fold(rows.keys, seen_step), failed & ~kept[row, at], repaired)
    # Behind the last draft comes one plain step.
    x = torch.where(failed[:, None], repaired, taken.at(fresh[here]))
    of_mean, of_x = solved[seen_step].unbind(1)
    centre = torch.addcmul(of_mean * taken.mean, of_x, seen)
    return replace(rows, x=x, k=rows.k + accepted + 1, centre=centre, std=taken.std, std_step=seen_step)


def _repair(target: Gaussian, draft: Gaussian, keys: Tensor, failed: Tensor, x: Tensor) -> Tensor:
    """Draw the failed rows again from what the target has more of than the draft; rows without noise get their mean."""
    still = (target.std == 0).all(-1)
    x = torch.where((failed & still)[:, None], target.mean, x)
    rows = (failed & ~still).nonzero()[:, 0]
    if len(rows):
        x[rows] = redraw(draft.rows(rows), target.rows(rows), keys[rows])
    return x


@dataclass(frozen=True)
class Coupled(Rule):
    """Head-level speculation for any diagonal Gaussian steps (learned variances, MAR). depth: drafted steps per head
    call; spread: deviation of a token given its context, in token units, that the drafts assume."""

    name: ClassVar[str] = "coupled"
    about: ClassVar[str] = (
        "Drafts steps inside a token's denoising and mirrors the noise of those that fail; the model's own law."
    )
    tokens: ClassVar[str] = VECTORS
    masked: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    alone: ClassVar[bool] = True
    needs_law: ClassVar[bool] = False
    needs_fixed: ClassVar[bool] = True

    depth: int = 6
    spread: float = 0.5

    def __post_init__(self) -> None:
        require(1 <= self.depth <= 100, "depth", self.depth, "a whole number from 1 to 100")
        require(0 <= self.spread <= WIDEST, "spread", self.spread, f"a number from 0 to {WIDEST}")

    def sample(self, law: ChainLaw, noise: Tensor, keys: Tensor) -> Tensor:
        """Tokens float32 [R, D] of all R places of a law; noise and keys as in `drafted_steps`."""
        return drafted_steps(law, min(self.depth, law.steps), self.spread, noise, keys)

    def verify(self, draft: Draft, law: ChainLaw, noise: Noise) -> Verdict:
        if draft.length:
            raise UsageError(f"rule {self.name!r} needs no drafter: drafter 'none' is allowed")
        return _one_each(self, law, noise)


@dataclass(frozen=True)
class Reflection(Coupled):
    """Head-level speculation by reflection, for steps with fixed deviations, equal in every direction (flow heads)."""

    name: ClassVar[str] = "reflection"
    about: ClassVar[str] = (
        "Drafts steps inside a token's denoising and mirrors the noise of those that fail; the model's own law."
    )
    isotropic: ClassVar[bool] = True
    masked: ClassVar[bool] = False

    def sample(self, law: ChainLaw, noise: Tensor, keys: Tensor) -> Tensor:
        if not law.isotropic:
            raise UsageError("rule 'reflection' needs steps of fixed deviation; for learned variances take 'coupled'")
        return super().sample(law, noise, keys)


@dataclass(frozen=True)
class PlainSteps(Rule):
    """The sequential sampler: T serial head calls with the position's own noise."""

    name: ClassVar[str] = "plain"
    about: ClassVar[str] = "Denoises one token after the other, as the model's authors do."
    tokens: ClassVar[str] = VECTORS
    sequential: ClassVar[bool] = True
    masked: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    seed_exact: ClassVar[bool] = True
    alone: ClassVar[bool] = True
    needs_law: ClassVar[bool] = False
    needs_fixed: ClassVar[bool] = True
    needs_uniforms: ClassVar[bool] = False

    def sample(self, law: ChainLaw, noise: Tensor, keys: Tensor) -> Tensor:
        """Tokens float32 [R, D] of all R places of a law; noise as in `drafted_steps`."""
        return sample_trajectory(law, None, noise).token

    def verify(self, draft: Draft, law: ChainLaw, noise: Noise) -> Verdict:
        if draft.length:
            raise UsageError("rule 'plain' is the sequential sampler: drafter 'none' is allowed")
        return _one_each(self, law, noise)


def _one_each(rule: Coupled | PlainSteps, law: ChainLaw, noise: Noise) -> Verdict:
    """A token of every image, sampled."""
    fixed = given(noise.fixed, rule, "fixed noise")
    none = torch.zeros(len(fixed), dtype=torch.int64, device=fixed.device)
    keys = given(noise.keys, rule, "fresh keys")[:, 0] if rule.needs_uniforms else none
    return Verdict(rule.sample(law, fixed[:, 0], keys)[:, None], none)
