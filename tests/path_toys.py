"""Toy denoising chains with nonlinear kernels, decoded by any rule, and two-sample tests without scipy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bozzetto.drafts import Draft, Verdict
from bozzetto.laws.chain import Ancestry, ChainLaw, Gaussian, Trajectory, sample_trajectory
from bozzetto.laws.noise import STREAM_DRAFT, STREAM_VERIFY, NormalField, fold, fresh_noise, image_keys
from bozzetto.rules.base import Noise, Rule

STEPS, DIM = 6, 4
_STD = torch.tensor([0.9, 0.7, 0.55, 0.4, 0.3, 0.2])
_PULL = torch.linspace(0.35, 0.85, STEPS)


def token_of(a: Ancestry, mean: Tensor, x: Tensor, step: Tensor) -> Tensor:
    """E[x_0 | state] of a step with that mean, [..., D]: x [..., D], step int64 [...]."""
    return (mean - a.of_state[step][..., None] * x) / a.of_token[step][..., None]


def mean_of(a: Ancestry, token: Tensor, x: Tensor, step: Tensor) -> Tensor:
    """Mean of the step from state x with E[x_0 | state] = token, [..., D]."""
    return a.of_token[step][..., None] * token + a.of_state[step][..., None] * x


@dataclass(frozen=True)
class ToyModel:
    """equal: the deviation of a step is one number, else each dimension's depends on state and context; still: the last
    step adds no noise; wrong: how far its kernels are from those of wrong = 0; apart: added to every mean; hot: factor
    of every deviation."""

    equal: bool = True
    still: bool = False
    wrong: float = 0.0
    apart: float = 0.0
    hot: float = 1.0

    def law(self, context: Tensor, position: Tensor) -> ToyLaw:
        """Laws after the tokens `context` float32 [B, W, D] (zeros at the start) at positions int64 [B, W]."""
        return ToyLaw(self, context.flatten(0, 1), position.flatten().float()[:, None], tuple(position.shape))

    def draft(self, wrong: float, apart: float = 0.0, hot: float = 1.0) -> ToyModel:
        """A draft model for this target."""
        return replace(self, wrong=wrong, apart=apart, hot=hot)


class ToyLaw(ChainLaw):
    """See ToyModel. Every kernel is a nonlinear function of state, step, position and the token before."""

    steps, dim = STEPS, DIM
    ancestry = Ancestry(
        torch.linspace(0.05, 0.9, STEPS),
        torch.linspace(1.0, 0.2, STEPS),
        torch.linspace(0.2, 0.9, STEPS),
        torch.linspace(0.8, 0.1, STEPS),
    )

    def __init__(self, model: ToyModel, context: Tensor, position: Tensor, shape: tuple[int, int]):
        self.model, self.shape = model, shape
        self.isotropic = model.equal and not model.still
        self.calls = self.rows = 0
        self.numbers = torch.arange(DIM, dtype=torch.float32)
        self.told = torch.sin(1.7 * context + 0.6 * position + self.numbers)
        self.table = _STD * model.hot
        if model.still:
            self.table[-1] = 0

    def kernel(self, x: Tensor, step: Tensor, place: Tensor) -> Gaussian:
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        model, pull, std = self.model, _PULL[step][:, None], self.table[step][:, None]
        told, turned = self.told[place], x.roll(1, -1)
        mean = torch.lerp(x, torch.tanh(1.4 * turned + told) + 0.8 * told, pull)
        if model.wrong or model.apart:
            mean = mean + model.wrong * torch.cos(2 * x + turned + self.numbers) * pull + model.apart
        if not model.equal:
            tilt = 0.4 * torch.sin(turned + 2 * told)
            if model.wrong:
                tilt = tilt + 0.5 * model.wrong * torch.cos(3 * x + self.numbers)
            std = std * tilt.exp()
        return Gaussian(mean, std)

    def std_later(self, std: Tensor, step: Tensor, later: Tensor) -> Tensor:
        if self.isotropic:
            return self.table[later][..., None]
        return std[:, None] * (self.table[later] / self.table[step].clamp_min(1e-3)[:, None])[..., None]


TARGETS = {
    "equal": ToyModel(),
    "unequal": ToyModel(equal=False),
    "equal-still": ToyModel(still=True),
    "unequal-still": ToyModel(equal=False, still=True),
}


@dataclass
class Decoded:
    """tokens: float32 [B, N, D]; accepted, offered: drafts kept and drafts made; passes: int64 [B]; moved: the largest
    distance that a verdict named among what was committed; first: the verdicts of the first pass."""

    tokens: Tensor
    accepted: int
    offered: int
    passes: Tensor
    moved: float
    first: Verdict


def fixed_noise(index: Tensor, length: int, seed: int = 0) -> Tensor:
    """The noise of the sequential sampler, float32 [B, N, T + 1, D]."""
    field = NormalField(seed, index, length, STEPS, DIM)
    field.fill(length)
    return field.table.unflatten(-1, field.shape)


def _noise_of(keys: Tensor) -> Tensor:
    """int64 [B, M] -> float32 [B, M, T + 1, D]."""
    return fresh_noise(keys.flatten(), STEPS, DIM).view(*keys.shape, STEPS + 1, DIM)


def draft_chain(model: ToyModel, before: Tensor, start: Tensor, noise: Tensor) -> Draft:
    """Tokens of M positions from `start` int64 [B] on, one after the other, with their paths and laws. before: the
    token in front [B, D]; noise: float32 [B, M, T + 1, D]."""
    batch, length = noise.shape[:2]
    place, contexts, paths = torch.arange(batch), [before], []
    for j in range(length):
        law = model.law(contexts[-1][:, None], (start + j)[:, None])
        paths.append(sample_trajectory(law, place, noise[:, j]))
        contexts.append(paths[-1].token)
    path = Trajectory(*(torch.stack(part, 1) for part in zip(*paths, strict=True)))
    position = start[:, None] + torch.arange(length)
    return Draft(path.token, trajectory=path, law=model.law(torch.stack(contexts[:-1], 1), position))


def decode(
    rule: Rule,
    target: ToyModel,
    draft: ToyModel,
    index: Tensor | range = range(60_000),
    length: int = 2,
    drafts: int = 2,
    seed: int = 0,
) -> Decoded:
    """Images `index` of `length` tokens, by as many passes as each needs. Rules with a window and paths of their own
    are given these as the next drafts, as a continuous Jacobi drafter does."""
    index = torch.as_tensor(list(index)) if isinstance(index, range) else index
    table = torch.zeros(len(index), 1 + length + drafts + 1, DIM)  # column i + 1 holds token i
    count, passes = torch.zeros_like(index), torch.zeros_like(index)
    # Rules that say nothing of fixed noise must not look at it.
    fixed = torch.full((len(index), length + drafts + 1, STEPS + 1, DIM), torch.nan)
    if rule.fixed_noise or not rule.needs_law:
        fixed = fixed_noise(index, fixed.shape[1], seed)
    roots = {stream: image_keys(seed, stream, index) for stream in (STREAM_DRAFT, STREAM_VERIFY)}
    accepted, offered, moved, carried, first = 0, 0, 0.0, None, None
    images = torch.arange(len(index))
    while len(images):
        start, left = count[images], torch.arange(len(images))
        keys = {
            s: fold(fold(root[images], passes[images])[:, None], torch.arange(drafts + 1)) for s, root in roots.items()
        }
        position = start[:, None] + torch.arange(drafts + 1)
        known = fixed[images[:, None], position]
        made = keys[STREAM_DRAFT][:, :drafts]
        fresh = known[:, :drafts] if rule.fixed_noise else _noise_of(made)
        if drafts == 0:
            draft_ = Draft(table[images, :0])
        elif carried is None:
            draft_ = draft_chain(draft, table[images, start], start, fresh)
        else:
            draft_ = _carry(carried, draft, table[images, start], start, fresh)
        contexts = torch.cat([table[images, start][:, None], draft_.tokens], 1)
        verdict = rule.verify(draft_, target.law(contexts, position), Noise(known, keys=keys[STREAM_VERIFY]))
        first = verdict if first is None else first
        new = torch.minimum(verdict.accepted + 1, length - start)
        for j in range(drafts + 1):
            rows = left[j < new]
            table[images[rows], start[rows] + 1 + j] = verdict.tokens[rows, j]
            if verdict.distance is not None and len(rows):
                moved = max(moved, float(verdict.distance[rows, j].max()))
        accepted += int(torch.minimum(verdict.accepted, new).sum())
        offered += int((length - start).clamp_max(drafts).sum())
        count[images] += new
        passes[images] += 1
        going = count[images] < length
        carried = (verdict.keep(going), new[going]) if rule.window and verdict.trajectory is not None else None
        images = images[going]
    assert first is not None
    return Decoded(table[:, 1 : 1 + length], accepted, offered, passes, moved, first)


def _carry(carried: tuple[Verdict, Tensor], draft: ToyModel, before: Tensor, start: Tensor, fresh: Tensor) -> Draft:
    """The target's paths of the last window, moved on; places that enter get drafts of the draft model."""
    verdict, moved = carried
    rows, length = torch.arange(len(start)), fresh.shape[1]
    paths: list[Trajectory] = []
    for j in range(length):
        entering = sample_trajectory(draft.law(before[:, None], (start + j)[:, None]), rows, fresh[:, j])
        column = moved + j
        inside = column <= length
        old = Trajectory(*(part[rows, column.clamp_max(length)] for part in verdict.trajectory))
        both = zip(old, entering, strict=True)
        paths.append(Trajectory(*(torch.where(inside[:, None, None], kept, added) for kept, added in both)))
        before = paths[-1].token
    path = Trajectory(*(torch.stack(part, 1) for part in zip(*paths, strict=True)))
    return Draft(path.token, trajectory=path)


def sequential(target: ToyModel, index: Tensor | range = range(60_000), length: int = 2, seed: int = 0) -> Tensor:
    """The sequential sampler's tokens [B, N, D]."""
    index = torch.as_tensor(list(index)) if isinstance(index, range) else index
    noise, tokens = fixed_noise(index, length, seed), [torch.zeros(len(index), DIM)]
    for n in range(length):
        law = target.law(tokens[-1][:, None], torch.full((len(index), 1), n))
        tokens.append(sample_trajectory(law, torch.arange(len(index)), noise[:, n]).token)
    return torch.stack(tokens[1:], 1)


def views(tokens: Tensor, projections: int = 8) -> Iterator[Tensor]:
    """Numbers to compare two samples by: coordinates, random projections, the norm. [B, ...] -> float64 [B] each."""
    flat = tokens.flatten(1).double()
    generator = torch.Generator().manual_seed(5)
    directions = torch.randn(flat.shape[1], projections, generator=generator, dtype=torch.float64)
    yield from flat.unbind(1)
    yield from (flat @ (directions / directions.norm(dim=0))).unbind(1)
    yield flat.norm(dim=1)


def gap_of(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Two samples of numbers -> sup |F - G| (Kolmogorov and Smirnov) and 2 int (F - G)^2, the energy distance."""
    both = torch.cat([one, other])
    order = torch.from_numpy(both.numpy().argsort())  # several times faster than torch's on a CPU
    both = both[order]
    sign = torch.where(order < len(one), 1 / len(one), -1 / len(other)).double()
    difference = sign.cumsum(0)
    return float(difference.abs().max()), float((2 * difference[:-1].square() * both.diff()).sum())


def ks_p_value(distance: float, n: int, m: int) -> float:
    """Asymptotic p-value of the two-sample Kolmogorov-Smirnov test (Stephens' correction)."""
    root = math.sqrt(n * m / (n + m))
    scaled = (root + 0.12 + 0.11 / root) * distance
    if scaled < 0.2:
        return 1.0
    return min(1.0, 2 * sum((-1) ** (j - 1) * math.exp(-2 * (j * scaled) ** 2) for j in range(1, 101)))


@dataclass(frozen=True)
class Comparison:
    """p_value: the smallest of the Kolmogorov-Smirnov tests, times their number; distance: the largest statistic;
    energy: mean energy distance of the projections."""

    p_value: float
    distance: float
    energy: float


def compare(one: Tensor, other: Tensor) -> Comparison:
    """Two samples of tokens [B, ...]."""
    gaps = [gap_of(a, b) for a, b in zip(views(one), views(other), strict=True)]
    worst = max(ks for ks, _ in gaps)
    p_value = min(1.0, len(gaps) * ks_p_value(worst, len(one), len(other)))
    return Comparison(p_value, worst, sum(energy for _, energy in gaps) / len(gaps))
