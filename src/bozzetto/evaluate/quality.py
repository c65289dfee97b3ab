"""Figures of quality, each declared once; and two questions that distances do not answer: is the class right, and are
training images recited?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bozzetto.evaluate.columns import Column
from bozzetto.evaluate.metrics import Comparison, Interval, interval, mean_interval, median_interval, replicate

# Figures of quality: a row each is all that tables, suites, JSON files and the report know of them.
QUALITY = (
    Column("frechet", "Fréchet", digits=1, measure=lambda m: interval(m.distance, m.distances)),
    Column("frechet_change", "change", "change from none", digits=1, sign=True, measure=Comparison.change),
    Column(
        "kernel",
        "kernel x1000",
        "kernel distance ×1000",
        scale=1000,
        measure=lambda m: interval(m.kernel(), replicate(m.kernel, m.w, m.v)),
    ),
    Column("precision", "precision", "precision", measure=lambda m: mean_interval(m.precision(), m.w)),
    Column("recall", "recall", "recall", measure=lambda m: mean_interval(m.recall(), m.v)),
    Column("consistency", "class", "class recognised", joined=False, measure=lambda m: m.right),
    Column(
        "identical", "same", "share identical to none", digits=1, unit="%", joined=False, measure=lambda m: m.identical
    ),
)
_SHRINKAGE = 0.2  # towards a round covariance: there are more features than a class has images
_CLOSE = 0.05


def class_probe(features: Tensor, labels: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Linear discriminant analysis on features of real images: which class does a picture show? One covariance for all
    classes, shrunk; every class is as likely as the others, however many images it has.

    features: float64 [N, d]; labels: int64 [N]. Returns the classes that have images, int64 [K], and what tells the
    likeliest of them: features [n, d] -> int64 [n].
    """
    x = features.double()
    classes, rows = labels.unique(return_inverse=True)
    means = torch.stack([x[rows == k].mean(0) for k in range(len(classes))])
    within = x - means[rows]
    covariance = within.T @ within / max(1, len(x) - len(classes))
    round_part = covariance.diagonal().mean().clamp_min(1e-12) * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve((1 - _SHRINKAGE) * covariance + _SHRINKAGE * round_part, means.T)
    bias = -0.5 * (means.T * weight).sum(0)
    return classes, lambda seen: classes[(seen.double() @ weight + bias).argmax(1)]


def nearest(features: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the nearest training image and its row: float64 [n], int64 [n]."""
    found = torch.cdist(features.double(), training.double()).min(1)
    return found.values, found.indices


def memorisation(samples: Tensor, unseen: Tensor, w: Tensor, v: Tensor) -> dict[str, Interval]:
    """From distances to the nearest training image, in feature space, of samples [n] and of photographs that were not
    trained on [m], with resamples w [R, n], v [R, m]. distance, distance_unseen: medians; close: share of samples that
    are nearer than the nearest 5% of the unseen photographs (5% would be expected of new photographs); nearer:
    probability that a sample is nearer to its training image than an unseen photograph is to its own (one half for new
    photographs, one for copies; the test of Meehan et al., arXiv 2004.05675)."""
    limit = torch.quantile(unseen, _CLOSE)
    ahead = (samples[:, None] < unseen[None]).double() + 0.5 * (samples[:, None] == unseen[None]).double()
    replicates = ((w @ ahead) * v).sum(1) / (w.sum(1) * v.sum(1))
    return {
        "distance": median_interval(samples, w),
        "distance_unseen": median_interval(unseen, v),
        "close": mean_interval((samples < limit).double(), w),
        "nearer": interval(float(ahead.mean()), replicates, share=True),
    }
