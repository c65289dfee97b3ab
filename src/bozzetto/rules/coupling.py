"""Couplings of two Gaussian steps: draw from the target's so that it is as often as possible what the draft drew.

- `reflect`: equal deviations sigma in every direction. With e the direction from draft mean to target mean, delta their
  distance in sigmas and z the draft's noise, the draft is kept where log u <= delta (<e, z> - delta / 2), the log of
  the density ratio; otherwise its noise is mirrored across e. The mirror image of what is rejected has exactly the
  missing mass, so nothing is drawn again. (Bou-Rabee, Eberle and Zimmer 2020; De Bortoli et al., arXiv 2501.05370.)
- `overlap`: any two diagonal Gaussians, by accept-reject: keep the draft with probability min(1, p/q), else draw from
  norm([p - q]+), `redraw`.

Both keep the draft with probability 1 - TV(p, q), the most that any coupling can.

Block verification (rules/path_block.py) also needs norm([w p - q]+) for a weight w <= 1, and a coin with odds S : 1 - w
for S = int [w p - q]+. Equal deviations have both in closed form (`excess`, `excess_draw`); for others `race_round`
needs nothing but the densities.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bozzetto.errors import UsageError
from bozzetto.laws.chain import Gaussian, log_ratio
from bozzetto.laws.noise import fold, normal, uniform

MOST_TRIES = 10_000  # some ten are common, a few hundred happen with very many numbers per token
_LARGEST_GROUP = 128  # candidates of one row that are judged at once
_TILTED = 0.5  # laws so close that draws of the target alone would rarely survive
_LEAST_GAP = 1e-12  # deviations; closer means are taken to be this far apart
_FAR = 40.0  # deviations beyond which a normal law has no mass in float64


def separation(draft: Gaussian, target: Gaussian) -> Tensor:
    """How far apart two diagonal Gaussians are, in deviations: float32 [...]; infinite where one of them is a point.

    It is sqrt(8 B), B the Bhattacharyya distance: the distance of the means where the deviations are equal.
    """
    product, mean_square = draft.std * target.std, (draft.std.square() + target.std.square()) / 2
    gap = (target.mean - draft.mean).square() / mean_square + 4 * (mean_square / product).log()
    return torch.where((product > 0).all(-1), gap.sum(-1).clamp_min(0).sqrt(), torch.inf)


def reflect(
    noise: Tensor, draft: Tensor, target: Gaussian, log_u: Tensor, drafted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """noise: float32 [..., D], the draft's standard normal noise; draft: its mean [..., D]; target: law with the same
    deviation [..., 1] > 0; log_u: float64 [...], log of a uniform -> (sample of the target [..., D], kept: bool [...]).

    Where kept, the sample is what was drafted, draft + std noise (drafted [..., D], where that is known to the bit).
    """
    gap = (target.mean - draft) / target.std
    along, square = torch.linalg.vecdot(gap, noise), torch.linalg.vecdot(gap, gap)
    kept = log_u <= torch.sub(along, square, alpha=0.5)
    share = (along / square.clamp_min(1e-30))[..., None]  # of the gap in the noise, which is mirrored
    mirrored = torch.addcmul(target.mean, target.std, torch.addcmul(noise, share, gap, value=-2))
    if drafted is None:
        drafted = torch.addcmul(draft, target.std, noise)
    return torch.where(kept[..., None], drafted, mirrored), kept


def overlap(x: Tensor, draft: Gaussian, target: Gaussian, keys: Tensor) -> tuple[Tensor, Tensor]:
    """x: float32 [R, D], drawn from `draft`; draft, target: diagonal Gaussians [R, ...]; keys: int64 [R], one per row
    -> (sample of the target [R, D], kept: bool [R]).

    A target without noise (deviation 0) gives its mean; it is kept where the draft has none either and x is that mean.
    Raises as `redraw` does.
    """
    kept = uniform(fold(keys, 0)).log() <= log_ratio(x, target, draft)
    out = x.clone()
    left = (~kept).nonzero()[:, 0]
    if len(left):
        out[left] = redraw(draft.rows(left), target.rows(left), keys[left])
    return out, kept


def redraw(draft: Gaussian, target: Gaussian, keys: Tensor) -> Tensor:
    """Samples float32 [R, D] of (p - q)_+, normalised, for target p and draft q: [R, ...], keys int64 [R].

    Raises UsageError where a redraw never survives, which finite densities cannot cause.
    """
    out = torch.empty_like(target.mean)
    left = torch.arange(len(keys), device=keys.device)
    before, size = 0, 2
    while len(left):
        if before >= MOST_TRIES:
            raise UsageError(f"a redraw did not end after {before} tries: the laws of a step are not finite")
        attempt = torch.arange(size, device=keys.device)
        rows = left.repeat_interleave(size)
        tried = fold(keys[left, None], before + 1 + attempt).flatten()
        y, coin, missing, _ = _try(draft.rows(rows), target.rows(rows), tried)
        lives = (coin < missing).view(-1, size)
        first = torch.where(lives, attempt, size).amin(1)  # the first that survives: groups change nothing
        found = (first < size).nonzero()[:, 0]
        out[left[found]] = y[found * size + first[found]]
        left = left[first == size]
        # Passes over the rows cost more than rows.
        before, size = before + size, min(4 * size, _LARGEST_GROUP)
    return out


def race_round(log_weight: Tensor, draft: Gaussian, target: Gaussian, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One round of a Bernoulli race between S = int [w p - q]+ and 1 - w, for target p and draft q [R, ...], log_weight
    float64 [R] <= 0, keys int64 [R], fresh in every round -> (won, lost: bool [R], y: float32 [R, D]).

    Rounds are repeated until one is won or lost, which it then is with probability S / (S + 1 - w); where won, y has
    the law norm([w p - q]+). Each round gives both their share by a coin: on heads a draw of the target survives with
    probability w - q/p, tails have lost.
    """
    y, coin, missing, mass = _try(draft, target, keys)
    rest = -log_weight.expm1()  # 1 - w
    heads = uniform(fold(keys, 3)) * (mass + rest) < mass
    return heads & (coin < missing - rest), ~heads, y


def _try(draft: Gaussian, target: Gaussian, keys: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A candidate for [w p - q]+: y float32 [R, D], with density p G / E_p G, where G(y) >= (1 - q/p)_+; u G(y), for u
    a uniform; 1 - q/p there; and E_p G, float64 [R] each.

    Plain draws of p (G = 1) survive about as often as the two laws differ, so that almost equal ones would need
    millions. In units of the target's noise z the log ratio is sum a z^2 + b z + c, and 1 - q/p is at most
    G = sum |a| z^2 + |b z| + |c|. So where the mean of G is small, one of its terms is picked by its mean, and p is
    drawn with the density that this term multiplies: z^2 or |z| in one direction, normal in the others.
    """
    dim = target.mean.shape[-1]
    still = (target.std == 0).all(-1), (draft.std == 0).all(-1)
    point = still[0] | still[1]
    mean, std = (torch.where(point[:, None], one, v.double()).expand_as(target.mean) for v, one in _parts(target))
    mean_q, std_q = (torch.where(point[:, None], one, v.double()).expand_as(target.mean) for v, one in _parts(draft))
    ratio, shift = std / std_q, (mean - mean_q) / std_q
    square, linear = (ratio.square() - 1) / 2, ratio * shift
    constant = (shift.square() / 2 - ratio.log()).sum(-1)
    slope = linear.norm(dim=-1)
    share = torch.cat([square.abs(), math.sqrt(2 / math.pi) * slope[:, None], constant.abs()[:, None]], -1)
    mass = share.sum(-1)
    tilted = (mass < _TILTED) & ~point
    pick = (uniform(fold(keys, 2))[:, None] * mass[:, None] >= share.cumsum(-1)).sum(-1).clamp_max(dim + 1)
    pick = torch.where(tilted, pick, dim + 1)

    numbers = normal(fold(fold(keys, 1)[:, None], torch.arange(dim + 2, device=keys.device))).double()
    z, more = numbers[:, :dim], numbers[:, dim:].square()
    # sign(z) sqrt(z^2 + n^2) has density ~ |z| exp(-z^2 / 2), with two more normals instead of one ~ z^2 exp(-z^2 / 2).
    chosen = pick[:, None] == torch.arange(dim, device=keys.device)
    z = torch.where(chosen, torch.copysign((z.square() + more.sum(-1, keepdim=True)).sqrt(), z), z)
    direction = linear / slope.clamp_min(1e-300)[:, None]
    along = (direction * z).sum(-1)
    longer = torch.copysign((along.square() + more[:, 0]).sqrt(), along) - along
    z = torch.where((pick == dim)[:, None], z + longer[:, None] * direction, z)

    terms = square * z.square()
    product = (linear * z).sum(-1)
    log_p_q = terms.sum(-1) + product + constant
    # Where a law is a point, the other has no mass there unless it is the same point.
    same = still[0] & still[1] & (target.mean == draft.mean).all(-1)
    log_p_q = torch.where(point, torch.where(same, 0.0, torch.inf), log_p_q)
    bound = torch.where(tilted, terms.abs().sum(-1) + product.abs() + constant.abs(), 1.0)
    y, coin = target.at(z.float()), uniform(fold(keys, 0)) * bound
    return y, coin, -(-log_p_q).expm1(), torch.where(tilted, mass, 1.0)


def _parts(law: Gaussian) -> tuple[tuple[Tensor, float], tuple[Tensor, float]]:
    """Mean and deviation, each with a value that does no harm."""
    return (law.mean, 0.0), (law.std, 1.0)


def excess(log_weight: Tensor, delta: Tensor) -> Tensor:
    """S = int [w p - q]+ of two Gaussians with equal deviations, their means delta of these apart (infinite: they do
    not meet). log_weight <= 0 and delta >= 0: float64 [...] -> float64 [...].

    Along e, in deviations from the draft's mean, w p exceeds q beyond tau = delta / 2 - log(w) / delta, which gives
    S = w Q(tau - delta) - Q(tau), Q the upper tail of the normal law.
    """
    gap = delta.clamp(_LEAST_GAP, 2 * _FAR)
    tau = gap / 2 - log_weight / gap
    mass = (log_weight.exp() * _tail(tau - gap) - _tail(tau)).clamp_min(0)
    return torch.where(delta > 2 * _FAR, log_weight.exp(), mass)


def excess_draw(log_weight: Tensor, draft: Tensor, target: Gaussian, keys: Tensor) -> Tensor:
    """Samples float32 [R, D] of norm([w p - q]+) for laws with the same deviation [R, 1] > 0; draft: mean [R, D]; keys
    int64 [R].

    Only the direction e between the means matters: there the tail S(s) = w Q(s - delta) - Q(s) is inverted by
    bisection, across it the noise is fresh. (The draft's own noise across e would not do: in block verification it is
    known by then that later steps did not like it.)
    """
    gap = (target.mean - draft).double() / target.std.double()
    delta = gap.norm(dim=-1)
    direction = gap / delta.clamp_min(1e-300)[:, None]
    # Beyond _FAR nothing is left of the draft: the target's own law, written about its mean.
    near = delta.clamp(_LEAST_GAP, 2 * _FAR)
    wanted = uniform(fold(keys, 0)) * excess(log_weight, near)
    low = near / 2 - log_weight / near
    high = torch.maximum(low, near) + _FAR
    weight = log_weight.exp()
    for _ in range(64):
        middle = (low + high) / 2
        below = weight * _tail(middle - near) - _tail(middle) > wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    noise = normal(fold(fold(keys, 1)[:, None], torch.arange(draft.shape[-1], device=keys.device))).double()
    along = (low + high) / 2 - near  # from the target's mean
    noise = noise + (along - (direction * noise).sum(-1))[:, None] * direction
    return target.at(noise.float())


def _tail(x: Tensor) -> Tensor:
    """Mass of the normal law beyond x."""
    return torch.special.erfc(x / math.sqrt(2)) / 2
