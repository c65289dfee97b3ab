"""Distances between two sets of images in feature space, with bootstrap intervals.

Everything is written for *weights*: how often each image counts. Ones give the figure itself, the counts of a bootstrap
resample give a replicate, so that a replicate costs no features and few matrix products. All in float64.

Fréchet distance: Heusel et al., arXiv 1706.08500 (there with Inception features; the features are the caller's here).
Kernel distance: the unbiased squared MMD with the cubic kernel of Binkowski et al., arXiv 1801.01401.
Precision and recall: Kynkäänniemi et al., arXiv 1904.06991.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

NEIGHBOURS = 3


@dataclass(frozen=True, order=True)
class Interval:
    """A figure and the range around it: its 95% interval, or lowest and highest; None where unknown."""

    value: float
    low: float | None = None
    high: float | None = None


def interval(value: float, replicates: Tensor, share: bool = False) -> Interval:
    """The replicates' 2.5% and 97.5% quantiles, moved so that their mean falls on the value. share: cut to 0..1.

    Resampling repeats images, which raises Fréchet distances (fewer distinct images, lower rank): the spread of the
    replicates is of use, their place is not. Resamples for which there is no figure (all of one image) do not count.
    replicates: float64 [R].
    """
    low, high, replicates = value, value, replicates[replicates.isfinite()]
    if len(replicates):
        spread = replicates.double() - replicates.double().mean()
        below, above = torch.quantile(spread, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        low, high = value + below, value + above
    return Interval(value, max(low, 0.0), min(high, 1.0)) if share else Interval(value, low, high)


def resamples(count: int, replicates: int, seed: int) -> Tensor:
    """How often each of `count` images is drawn in each bootstrap resample: float64 [replicates, count]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (replicates, count), generator=generator)
    return torch.zeros(replicates, count, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())


class Comparison:
    """Two sets of features and what all their replicates share. x: samples [n, d]; y: reference [m, d]; float64.

    With resamples w float64 [R, n] and v [R, m] it has all that figures of quality are made of. right: share in which
    the probe of classes sees the class asked for; identical: share whose tokens are those of sequential decoding (None:
    no tokens); base: sequential decoding's comparison (None: for itself, and for photographs)."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        w: Tensor | None = None,
        v: Tensor | None = None,
        *,
        right: Interval | None = None,
        identical: float | None = None,
        base: Comparison | None = None,
    ):
        self.x, self.y = x.double(), y.double()
        self.cross = self.x @ self.y.T
        nothing = torch.zeros(0, 0, dtype=torch.float64)
        self.w, self.v = nothing if w is None else w, nothing if v is None else v
        self.right, self.identical, self.base = right, identical, base

    def frechet(self, w: Tensor | None = None, v: Tensor | None = None) -> float:
        """|mx - my|^2 + tr(Sx + Sy - 2 (Sx Sy)^(1/2)) with weights w [n], v [m] (None: all ones).

        The trace of the root is the nuclear norm of the centred Xc Yc^T: no d x d matrix, and no root of eigenvalues
        that are zero but for rounding where there are fewer images than features.
        """
        exact = w is None and v is None
        w, rows = _support(w, self.x)
        v, columns = _support(v, self.y)
        x, y = self.x[rows], self.y[columns]
        n, m = w.sum(), v.sum()
        mean_x, mean_y = (w @ x) / n, (v @ y) / m
        spread_x = w @ (x - mean_x).square().sum(1) / (n - 1)
        spread_y = v @ (y - mean_y).square().sum(1) / (m - 1)
        cross = self.cross[rows][:, columns]
        cross = cross - (x @ mean_y)[:, None] - (y @ mean_x)[None] + mean_x @ mean_y
        cross = w.sqrt()[:, None] * cross * v.sqrt()
        root = torch.linalg.svdvals(cross).sum() if exact else _nuclear_norm(cross)
        return float((mean_x - mean_y).square().sum() + spread_x + spread_y - 2 * root / ((n - 1) * (m - 1)).sqrt())

    def kernel(self, w: Tensor | None = None, v: Tensor | None = None) -> float:
        """Unbiased squared MMD, k(a, b) = (a.b / d + 1)^3. An image is never compared with itself, nor with its own
        repetitions in a resample."""
        w = torch.ones_like(self.x[:, 0]) if w is None else w
        v = torch.ones_like(self.y[:, 0]) if v is None else v
        k_xx, k_xy, k_yy = self.kernels
        across = w @ k_xy @ v / (w.sum() * v.sum())
        return float(_off_diagonal_mean(k_xx, w) + _off_diagonal_mean(k_yy, v) - 2 * across)

    @cached_property
    def kernels(self) -> tuple[Tensor, Tensor, Tensor]:
        """The cubic kernel of x with x, of x with y, and of y with y."""
        return _cubic(self.x, self.x), _cubic(self.x, self.y), _cubic(self.y, self.y)

    @cached_property
    def distance(self) -> float:
        """The Fréchet distance."""
        return self.frechet()

    @cached_property
    def distances(self) -> Tensor:
        """Fréchet distances of the resamples: float64 [R]."""
        return replicate(self.frechet, self.w, self.v)

    def change(self) -> Interval | None:
        """Of the distance from that of sequential decoding. Both have the same draws, so that differences between
        methods are differences of paired images."""
        if self.base is None:
            return None
        return interval(self.distance - self.base.distance, self.distances - self.base.distances)

    def precision(self) -> Tensor:
        """Which samples lie within a ball of the reference: float64 [n] of zeros and ones."""
        return _covered(self.x, self.y)

    def recall(self) -> Tensor:
        """Which reference images lie within a ball of the samples: float64 [m]."""
        return _covered(self.y, self.x)


def _support(weights: Tensor | None, features: Tensor) -> tuple[Tensor, Tensor]:
    """Non-zero weights and their rows."""
    if weights is None:
        return torch.ones(len(features), dtype=torch.float64), torch.arange(len(features))
    rows = weights.nonzero().squeeze(1)
    return weights[rows], rows


def _nuclear_norm(a: Tensor) -> Tensor:
    """Sum of singular values by way of the smaller Gram matrix: quick, and good to about 1e-6, enough for a spread."""
    gram = a @ a.T if a.shape[0] <= a.shape[1] else a.T @ a
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().sum()


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    from torchmetrics.image.kid import poly_kernel

    return poly_kernel(a, b, degree=3, gamma=None, coef=1.0)


def _off_diagonal_mean(kernel: Tensor, w: Tensor) -> Tensor:
    pairs = w.sum().square() - w.square().sum()
    return (w @ kernel @ w - w.square() @ kernel.diagonal()) / pairs


def _covered(points: Tensor, centres: Tensor) -> Tensor:
    """1 where a point is within some centre's distance to its third nearest fellow (the farthest, of fewer; a centre
    without fellows has only itself): float64 [n]."""
    apart = torch.cdist(centres, centres)
    if len(centres) < 2:
        radius = apart[0]
    else:
        apart.fill_diagonal_(float("inf"))
        radius = apart.topk(min(NEIGHBOURS, len(centres) - 1), largest=False).values[:, -1]
    return (torch.cdist(points, centres) <= radius).any(1).double()


def mean_interval(values: Tensor, counts: Tensor, share: bool = True) -> Interval:
    """The mean of figures [n] with its interval; counts: float64 [R, n] from `resamples`; share: of zeros and ones."""
    return interval(float(values.mean()), counts @ values / counts.sum(1), share)


def median_interval(values: Tensor, counts: Tensor) -> Interval:
    """The lower median of figures [n] with its interval; counts: float64 [R, n] from `resamples`."""
    ranked, order = values.double().sort()
    reached = counts[:, order].cumsum(1) >= counts.sum(1, keepdim=True) / 2
    return interval(float(values.double().median()), ranked[reached.double().argmax(1)])


def replicate(figure: Callable[[Tensor, Tensor], float], w: Tensor, v: Tensor) -> Tensor:
    """A figure for every pair of resamples w [R, n], v [R, m]: float64 [R]."""
    return torch.tensor([figure(a, b) for a, b in zip(w, v, strict=True)], dtype=torch.float64)
