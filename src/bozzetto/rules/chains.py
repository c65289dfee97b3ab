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

from bozzetto.drafts.path import PathDraft, PathVerdict
from bozzetto.errors import UsageError
from bozzetto.laws.chain import ChainLaw, Gaussian, Path
from bozzetto.laws.noise import fold, uniform
from bozzetto.rules.base import leading
from bozzetto.rules.coupling import fresh_noise, overlap, reflect, separation
from bozzetto.rules.paths import PathNoise, PathRule


@dataclass(frozen=True)
class Chains(PathRule):
    """reach: laws of a step farther apart than this many deviations (`separation`) are not coupled to meet: they get
    the same noise, which keeps parted chains as close as they are. The choice depends on the two laws only, so that
    any reach is exact; inf: all are coupled."""

    name: ClassVar[str] = "chains"
    exact: ClassVar[bool] = True
    window: ClassVar[bool] = True

    reach: float = math.inf

    def __post_init__(self) -> None:
        if not self.reach >= 0:
            raise UsageError(f"reach = {self.reach} is not allowed: a number >= 0")

    def verify(self, draft: PathDraft, law: ChainLaw, noise: PathNoise) -> PathVerdict:
        batch, length = draft.tokens.shape[:2]
        place = torch.arange(batch * (length + 1), device=noise.keys.device)
        # The place after the drafts has none: a plain chain.
        fresh = fresh_noise(noise.keys[:, -1], law.steps, law.dim)[:, None]  # [B, 1, T + 1, D]
        states, laws = [fresh[:, :, 0]], []
        pairs = None
        if length:
            if draft.path is None:
                raise ValueError("rule 'chains' needs the drafts' paths")
            pairs = _Pairs(draft.path, law, noise.keys[:, :length], self.reach)
            states = [torch.cat([draft.path.states[:, :, 0], fresh[:, :, 0]], 1)]
        for k in range(law.steps):
            kernel = law.kernel(states[-1].flatten(0, 1), torch.full_like(place, k), place)
            laws.append(Gaussian(*(part.unflatten(0, (batch, length + 1)) for part in kernel)))
            x = Gaussian(laws[-1].mean[:, length:], laws[-1].std[:, length:]).at(fresh[:, :, k + 1])
            if pairs is not None:
                target = Gaussian(laws[-1].mean[:, :length], laws[-1].std[:, :length])
                x = torch.cat([pairs.couple(target, k), x], 1)
            states.append(x)
        mean, std = (torch.stack(part, 2) for part in zip(*laws, strict=True))
        path = Path(torch.stack(states, 2), mean, std)
        same = (path.token[:, :length] == draft.tokens).all(-1)
        return PathVerdict(path.token, leading(same), path)


class _Pairs:
    """The recorded draft chains [B, M, ...] that a target's are coupled with, and the randomness of all steps."""

    def __init__(self, path: Path, law: ChainLaw, keys: Tensor, reach: float):
        self.path, self.reach = path, reach
        self.keys = fold(keys[..., None], torch.arange(law.steps, device=keys.device))  # [B, M, T]
        self.noise = (path.states[:, :, 1:] - path.mean) / path.std  # [B, M, T, D]
        # A reflection mirrors the draft's noise: there has to be some, as much as the target's.
        step = torch.zeros(1, dtype=torch.int64, device=keys.device)
        steps = torch.arange(law.steps, device=keys.device)[None]
        self.reflected = law.isotropic and bool((path.std > 0).all())
        self.equal = self.reflected and bool((path.std == law.std_later(path.std[:1, 0, 0], step, steps)).all())
        self.log_u = uniform(self.keys).log() if self.reflected else None

    def couple(self, target: Gaussian, k: int) -> Tensor:
        """The target's next states [B, M, D] at step k."""
        if self.log_u is None or not self.equal or self.reach < math.inf:
            return self._couple(target, k)
        x, kept = reflect(self.noise[:, :, k], self.path.mean[:, :, k], target, self.log_u[:, :, k])
        return torch.where(kept[..., None], self.path.states[:, :, k + 1], x)  # where kept, the very same numbers

    def _couple(self, target: Gaussian, k: int) -> Tensor:
        """The same in general."""
        path, noise = self.path, self.noise[:, :, k]
        drafted, draft = path.states[:, :, k + 1], Gaussian(path.mean[:, :, k], path.std[:, :, k])
        far = separation(draft, target) > self.reach
        if self.log_u is not None:
            x, kept = reflect(noise, draft.mean, target, self.log_u[:, :, k])
            far |= (draft.std != target.std).any(-1)  # no mirror image
        else:
            far &= (draft.std > 0).all(-1)  # a point has no noise to share
            x, kept = torch.empty_like(drafted), torch.zeros_like(far)
            near = (~far).nonzero(as_tuple=True)
            keys = self.keys[:, :, k][near]
            x[near], kept[near] = overlap(drafted[near], draft.rows(near), target.rows(near), keys)
        x = torch.where(far[..., None], target.at(noise), x)
        return torch.where((kept & ~far)[..., None], drafted, x)
