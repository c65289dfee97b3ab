"""Coupled chains: the target's own denoising chains, coupled step by step with the recorded draft chains. Exact.

At every place of a window the target runs its own chain under the drafts before it, T serial head calls for all places
together. Chain and draft start in the same state. Each step is coupled with the draft's so that the two are in the same
next state as often as possible: by reflection where deviations are equal, which also lets chains that have parted meet
again; by overlap where they are not (rules/coupling.py; for reflected chains De Bortoli et al., arXiv 2501.05370). A
draft is accepted where the two chains end in the same state; otherwise the target's own token is the next token, and
nothing is drawn again.

Why it stays exact from pass to pass of a window that carries these chains on as drafts: a coupling has the right law
whatever it is coupled with, as long as its randomness is fresh. So given everything at earlier places, the chain at a
place is a draw from the target's law under the context that it was scored with, and remains one as the draft of the
next pass, whose context is made at earlier places alone. A token is committed in the first pass in which its context is
final; that too is an event at earlier places, so that it does not select among the token's own values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bozzetto.drafts import VECTORS, Draft, Verdict
from bozzetto.errors import require
from bozzetto.laws.chain import ChainLaw, Gaussian, Trajectory, sample_trajectory
from bozzetto.laws.noise import fold, fresh_noise, uniform
from bozzetto.rules.base import Noise, Rule, given, leading
from bozzetto.rules.coupling import overlap, reflect, separation


@dataclass(frozen=True)
class Chains(Rule):
    """reach: laws of a step farther apart than this many deviations (`separation`) are not coupled to meet: they get
    the same noise, which keeps parted chains as close as they are. The choice depends on the two laws only, so that
    any reach is exact; inf: all are coupled."""

    name: ClassVar[str] = "chains"
    about: ClassVar[str] = (
        "Keeps a token whose every denoising step could have been the model's own, and mirrors the noise "
        "where one could not; the model's own law."
    )
    tokens: ClassVar[str] = VECTORS
    exact: ClassVar[bool] = True
    window: ClassVar[bool] = True
    widest: ClassVar[int] = 20

    reach: float = math.inf

    def __post_init__(self) -> None:
        require(self.reach >= 0, "reach", self.reach, "a number >= 0")

    def verify(self, draft: Draft, law: ChainLaw, noise: Noise) -> Verdict:
        (batch, length), keys = draft.tokens.shape[:2], given(noise.keys, self, "fresh keys")
        if not length:
            trajectory = sample_trajectory(law, None, fresh_noise(keys[:, -1], law.steps, law.dim))
            trajectory = Trajectory(*(part[:, None] for part in trajectory))
            return Verdict(trajectory.token, torch.zeros_like(keys[:, 0]), trajectory=trajectory)
        drafted = given(draft.trajectory, self, "the drafts' paths")
        mirrored, equal = _alike(drafted.std, law)
        found = law.reflected(drafted, keys) if equal and self.reach == math.inf else None
        if found is None:
            found = _coupled(drafted, law, keys, self.reach, mirrored, equal)
        trajectory = Trajectory(*(part.unflatten(0, (batch, length + 1)) for part in found))
        same = (trajectory.token[:, :length] == draft.tokens).all(-1)
        return Verdict(trajectory.token, leading(same), trajectory=trajectory)


def _with_plain(trajectory: Trajectory, fresh: Tensor) -> Trajectory:
    """Draft trajectories [B, M, ...] with one more place, which has no draft: a stand-in of fresh noise [B, 1, T + 1,
    D], of mean 0 and deviation 1. (Nothing is kept of it, and the mirror image of fresh noise is fresh noise.)"""
    mean = torch.zeros_like(fresh[:, :, 1:])
    extra = (fresh, mean, torch.ones_like(trajectory.std[:, :1]))
    return Trajectory(*(torch.cat(pair, 1) for pair in zip(trajectory, extra, strict=True)))


def _alike(drafts: Tensor, law: ChainLaw) -> tuple[bool, bool]:
    """Whether steps of drafts with deviations [B, M, T, D or 1] can be coupled with the law's by reflection, which
    mirrors the draft's noise: there has to be some, as much as the target's; and whether all of them can."""
    if not (law.isotropic and bool((drafts > 0).all())):
        return False, False
    step, steps = drafts.new_zeros(1, dtype=torch.int64), torch.arange(law.steps, device=drafts.device)[None]
    return True, bool((drafts == law.std_later(drafts[:1, 0, 0], step, steps)).all())


def _coupled(
    drafted: Trajectory, law: ChainLaw, keys: Tensor, reach: float, reflected: bool, equal: bool
) -> Trajectory:
    """The target's chains [P, ...], each step coupled with that of recorded draft chains [B, M, ...]. Places are
    numbered as the law's; the last of each image has no draft. reflected, equal: see `_alike`."""
    trajectory = _with_plain(drafted, fresh_noise(keys[:, -1], law.steps, law.dim)[:, None])
    batch, places = keys.shape
    plain = (torch.arange(places, device=keys.device) == places - 1).repeat(batch)
    keys = fold(keys[..., None], torch.arange(law.steps, device=keys.device)).flatten(0, 1)  # [P, T]
    states, mean, std = (part.flatten(0, 1) for part in trajectory)
    drawn = states[:, 1:]
    noise, log_u = (drawn - mean) / std, uniform(keys).log().masked_fill_(plain[:, None], torch.inf)
    parts = map(_by_step, (drawn, mean, std, noise, log_u))
    by_step = tuple(zip(*parts, strict=True))

    def couple(target: Gaussian, k: int) -> Tensor:
        drafted, mean, std, noise, log_u = by_step[k]
        if equal and reach == math.inf:
            return reflect(noise, mean, target, log_u, drafted)[0]
        draft = Gaussian(mean, std)
        far = separation(draft, target) > reach
        if reflected:
            x, _ = reflect(noise, mean, target, log_u, drafted)
            far |= (std != target.std).any(-1)  # no mirror image
            far &= ~plain  # mirrored, as where all are: a place's token is its own affair
        else:
            far &= (std > 0).all(-1)  # a point has no noise to share
            x = torch.empty_like(drafted)
            near = (~(far | plain)).nonzero()[:, 0]
            x[near], _ = overlap(drafted[near], draft.rows(near), target.rows(near), keys[near, k])
            far |= plain
        return torch.where(far[:, None], target.at(noise), x)

    x, laws, out = states[:, 0], [], [states[:, 0]]
    for k in range(law.steps):
        kernel = law.all_places(x, k)
        x = couple(kernel, k)
        out.append(x)
        laws.append(kernel)
    return Trajectory(torch.stack(out, 1), *(torch.stack(part, 1) for part in zip(*laws, strict=True)))


def _by_step(part: Tensor) -> tuple[Tensor, ...]:
    """[P, T, ...] -> T tensors [P, ...]."""
    return part.transpose(0, 1).contiguous().unbind(0)
