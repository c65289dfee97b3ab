"""Couplings and residuals of Gaussian steps have the laws that they promise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bozzetto.errors import UsageError
from bozzetto.laws.chain import Gaussian, log_density, log_ratio
from bozzetto.laws.noise import fold, fresh_noise, image_keys, uniform
from bozzetto.rules import coupling
from bozzetto.rules.coupling import excess, excess_draw, overlap, race_round, redraw, reflect, separation
from path_toys import gap_of, ks_p_value, views

ROWS, DIM = 60_000, 4
ACCEPTABLE = 1e-4
DRAFT = Gaussian(torch.tensor([0.3, -0.2, 0.1, 0.5]), torch.tensor([0.5, 0.7, 0.4, 0.6]))
TARGETS = {
    "far": Gaussian(torch.tensor([1.3, -0.4, 0.8, 0.1]), torch.tensor([0.6, 0.5, 0.5, 0.7])),
    "near": Gaussian(torch.tensor([0.33, -0.24, 0.12, 0.49]), torch.tensor([0.51, 0.69, 0.405, 0.6])),
    "means-only": Gaussian(torch.tensor([0.34, -0.2, 0.13, 0.5]), DRAFT.std),
    "deviations-only": Gaussian(DRAFT.mean, torch.tensor([0.52, 0.7, 0.41, 0.59])),
}


def keys(count: int = ROWS, seed: int = 0) -> Tensor:
    return image_keys(seed, 9, torch.arange(count))


def spread_out(law: Gaussian, count: int = ROWS) -> Gaussian:
    return Gaussian(law.mean.expand(count, -1), law.std.expand(count, -1))


def draw(law: Gaussian, count: int = ROWS, seed: int = 1) -> Tensor:
    noise = torch.randn(count, law.mean.shape[-1], generator=torch.Generator().manual_seed(seed))
    return law.mean + law.std * noise


def p_value(one: Tensor, other: Tensor) -> float:
    tests = [ks_p_value(gap_of(a, b)[0], len(one), len(other)) for a, b in zip(views(one), views(other), strict=True)]
    return min(1.0, len(tests) * min(tests))


def by_brute_force(draft: Gaussian, target: Gaussian, weight: float, count: int) -> Tensor:
    """Draws of norm([w p - q]+) by plain rejection."""
    y = draw(target, count, seed=2)
    u = torch.rand(count, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return y[u < weight - log_ratio(y, draft, target).exp()]


BRUTE = {"far": 100_000, "near": 1_000_000, "means-only": 1_000_000, "deviations-only": 1_000_000}


def test_the_kolmogorov_smirnov_test_is_calibrated() -> None:
    assert ks_p_value(1.358 * math.sqrt(2 / 1e6), 10**6, 10**6) == pytest.approx(0.05, rel=0.01)
    assert ks_p_value(1.949 * math.sqrt(2 / 1e6), 10**6, 10**6) == pytest.approx(0.001, rel=0.01)
    one, other = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([0.5, 5.0]).double()
    # F - G is 1/3 on [0, .5), -1/6 on [.5, 1), 1/6 on [1, 2), 1/2 on [2, 5).
    energy = 2 * (0.5 / 9 + 0.5 / 36 + 1 / 36 + 3 / 4)
    assert gap_of(one, other) == (pytest.approx(0.5), pytest.approx(energy))


def test_ratios_of_points() -> None:
    x = torch.tensor([[1.0, 2.0]]).expand(4, -1)
    other = x + torch.tensor([0.0, 1e-6])
    still, moving = torch.zeros(4, 1), torch.ones(4, 1)
    assert log_ratio(x, Gaussian(x, still), Gaussian(x, still)).tolist() == [0.0] * 4
    assert log_ratio(x, Gaussian(other, still), Gaussian(x, still)).tolist() == [-math.inf] * 4
    assert log_ratio(x, Gaussian(x, moving), Gaussian(x, still)).tolist() == [-math.inf] * 4
    assert log_ratio(x, Gaussian(x, still), Gaussian(x, moving)).tolist() == [-math.inf] * 4
    wide = Gaussian(x, torch.full((4, 1), 2.0))
    assert log_ratio(x, wide, Gaussian(x, moving)).tolist() == pytest.approx([-2 * math.log(2)] * 4)


def test_densities_agree_with_torch() -> None:
    law = spread_out(DRAFT, 50)
    x = draw(DRAFT, 50)
    wanted = torch.distributions.Normal(law.mean.double(), law.std.double()).log_prob(x.double()).sum(-1)
    assert torch.allclose(log_density(x, law), wanted, atol=1e-5)


def test_separation() -> None:
    apart = Gaussian(DRAFT.mean + torch.tensor([0.3, 0.0, -0.4, 0.0]), torch.full((DIM,), 0.25))
    same = Gaussian(DRAFT.mean, apart.std)
    assert float(separation(same, apart)) == pytest.approx(2.0)
    assert float(separation(DRAFT, DRAFT)) == 0
    one = Gaussian(DRAFT.mean, torch.tensor([0.25]))
    assert float(separation(one, Gaussian(apart.mean, one.std))) == pytest.approx(2.0)
    for target in TARGETS.values():
        assert float(separation(DRAFT, target)) == pytest.approx(float(separation(target, DRAFT)), rel=1e-4)
        assert float(separation(DRAFT, target)) > 0.05
    point = Gaussian(DRAFT.mean, torch.zeros(1))
    assert (
        float(separation(point, DRAFT))
        == float(separation(DRAFT, point))
        == float(separation(point, point))
        == math.inf
    )


@pytest.mark.parametrize("delta", [0.0, 0.05, 1.0, 4.0, 30.0])
def test_reflection_has_the_targets_law_and_the_largest_overlap(delta: float) -> None:
    std = torch.full((ROWS, 1), 0.3)
    direction = torch.tensor([0.6, 0.0, -0.8, 0.0])
    mean = DRAFT.mean.expand(ROWS, -1)
    target = Gaussian(mean + 0.3 * delta * direction, std)
    noise = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(4))
    x, kept = reflect(noise, mean, target, uniform(keys()).log())
    assert p_value(x, draw(target)) > ACCEPTABLE
    assert float(kept.double().mean()) == pytest.approx(math.erfc(delta / math.sqrt(8)), abs=5 * 0.5 / math.sqrt(ROWS))
    assert torch.equal(x[kept], torch.addcmul(mean, std, noise)[kept])
    across = noise - (noise * direction).sum(-1, keepdim=True) * direction
    moved = (x - target.mean) / 0.3
    assert torch.allclose(
        moved[~kept] - (moved[~kept] * direction).sum(-1, keepdim=True) * direction, across[~kept], atol=1e-4
    )


@pytest.mark.parametrize("name", TARGETS)
def test_overlap_has_the_targets_law_and_the_largest_overlap(name: str) -> None:
    draft, target = spread_out(DRAFT), spread_out(TARGETS[name])
    x = draw(draft)
    out, kept = overlap(x, draft, target, keys())
    assert p_value(out, draw(target, seed=5)) > ACCEPTABLE
    assert torch.equal(out[kept], x[kept]) and not bool((out == x)[~kept].any())
    most = log_ratio(x, target, draft).exp().clamp_max(1).mean()
    assert float(kept.double().mean()) == pytest.approx(float(most), abs=5 * 0.5 / math.sqrt(ROWS))


def test_overlap_of_points() -> None:
    x, moving = draw(DRAFT, 100), spread_out(DRAFT, 100)
    still = Gaussian(x.clone(), torch.zeros(100, 1))
    out, kept = overlap(x, still, still, keys(100))
    assert bool(kept.all()) and torch.equal(out, x)
    shifted = Gaussian(x + 1, torch.zeros(100, 1))
    for draft in (still, moving):
        out, kept = overlap(x, draft, shifted, keys(100))
        assert not bool(kept.any()) and torch.equal(out, x + 1)
    out, kept = overlap(x, still, moving, keys(100))
    assert not bool(kept.any()) and not bool((out == x).any())


@pytest.mark.parametrize("name", TARGETS)
def test_redraws_follow_the_residual(name: str) -> None:
    wanted = by_brute_force(DRAFT, TARGETS[name], 1.0, BRUTE[name])
    got = redraw(spread_out(DRAFT, 40_000), spread_out(TARGETS[name], 40_000), keys(40_000))
    assert p_value(got, wanted) > ACCEPTABLE
    assert p_value(draw(TARGETS[name]), wanted) < 1e-9  # the test sees the difference


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6])
def test_redraws_of_almost_equal_laws_take_few_tries(gap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain rejection would need 1 / TV of them."""
    monkeypatch.setattr(coupling, "MOST_TRIES", 300)
    dim, rows = 16, 2000
    draft = Gaussian(torch.zeros(rows, dim), torch.ones(rows, dim))
    y = redraw(draft, Gaussian(torch.full((rows, dim), gap), draft.std), keys(rows))
    # To first order the residual is |s| phi(s) on s > 0 along the means: a Rayleigh law.
    along = y.double().sum(-1) / math.sqrt(dim)
    assert ks_p_value(gap_of(along, (-2 * uniform(keys(rows, 3)).log()).sqrt())[0], rows, rows) > ACCEPTABLE
    redraw(draft, Gaussian(draft.mean, draft.std * (1 + gap)), keys(rows))


def test_broken_laws_fail_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coupling, "MOST_TRIES", 20)
    law = spread_out(DRAFT, 3)
    with pytest.raises(UsageError, match="did not end"):
        redraw(law, Gaussian(law.mean * torch.nan, law.std), keys(3))
    with pytest.raises(UsageError, match="did not end"):
        redraw(law, law, keys(3))  # there is no residual


WEIGHTS = [1.0, 0.9, 0.5, 0.01]


def numeric(weight: float, delta: float) -> tuple[Tensor, Tensor]:
    """A fine grid, and [w phi(s - delta) - phi(s)]+ times its step there."""
    s = torch.linspace(-12, 12 + delta, 400_001, dtype=torch.float64)
    density = (weight * (-((s - delta) ** 2) / 2).exp() - (-(s**2) / 2).exp()) / math.sqrt(2 * math.pi)
    return s, density.clamp_min(0) * float(s[1] - s[0])


@pytest.mark.parametrize("delta", [0.01, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_excess_is_the_integral(weight: float, delta: float) -> None:
    mass = excess(torch.tensor([weight]).double().log(), torch.tensor([delta]).double())
    assert float(mass) == pytest.approx(float(numeric(weight, delta)[1].sum()), rel=1e-4, abs=1e-9)


def test_excess_at_the_ends() -> None:
    log_w = torch.tensor([0.0, 0.0, -1.0, -torch.inf, 0.0, -torch.inf], dtype=torch.float64)
    delta = torch.tensor([1e-6, torch.inf, torch.inf, 1.0, 0.0, 0.0], dtype=torch.float64)
    mass = excess(log_w, delta)
    assert mass[:4].tolist() == pytest.approx([1e-6 / math.sqrt(2 * math.pi), 1.0, math.exp(-1), 0.0], rel=1e-6)
    assert bool((mass >= 0).all()) and float(mass[4]) < 1e-12 and float(mass[5]) == 0


@pytest.mark.parametrize(("weight", "delta"), [(1.0, 0.01), (1.0, 2.0), (0.5, 1.0), (0.9, 6.0), (1.0, 500.0)])
def test_draws_of_the_excess_in_closed_form(weight: float, delta: float) -> None:
    rows = 40_000
    direction = torch.tensor([0.6, 0.0, -0.8, 0.0])
    std, mean = torch.full((rows, 1), 0.3), DRAFT.mean.expand(rows, -1)
    target = Gaussian(mean + 0.3 * delta * direction, std)
    log_w = torch.full((rows,), weight, dtype=torch.float64).log()
    noise = ((excess_draw(log_w, mean, target, keys(rows)) - mean) / 0.3).double()
    along = (noise * direction).sum(-1)
    s, mass = numeric(weight, min(delta, 80.0))
    cumulated = mass.cumsum(0) / mass.sum()
    wanted = s[torch.searchsorted(cumulated, uniform(keys(rows, 5)))] + max(0.0, delta - 80)
    assert ks_p_value(gap_of(along, wanted)[0], rows, rows) > ACCEPTABLE
    # Across the means the noise is plain.
    for other in (torch.tensor([0.8, 0.0, 0.6, 0.0]), torch.tensor([0.0, 1.0, 0.0, 0.0])):
        across = (noise * other).sum(-1)
        plain = torch.randn(rows, generator=torch.Generator().manual_seed(6)).double()
        assert ks_p_value(gap_of(across, plain)[0], rows, rows) > ACCEPTABLE


@pytest.mark.parametrize("weight", [1.0, 0.95, 0.5])
@pytest.mark.parametrize("name", ["far", "near"])
def test_races_have_the_right_odds_and_the_residuals_law(name: str, weight: float) -> None:
    rows = 40_000
    draft, target = spread_out(DRAFT, rows), spread_out(TARGETS[name], rows)
    log_w = torch.full((rows,), weight, dtype=torch.float64).log()
    won, y = torch.zeros(rows, dtype=torch.bool), torch.empty(rows, DIM)
    left, attempt = torch.arange(rows), 0
    while len(left):
        attempt += 1
        picked = fold(keys(rows)[left], attempt)
        wins, loses, candidate = race_round(log_w[left], draft.rows(left), target.rows(left), picked)
        assert not bool((wins & loses).any())
        won[left], y[left[wins]] = wins, candidate[wins]
        left = left[~(wins | loses)]
    wanted = by_brute_force(DRAFT, TARGETS[name], weight, BRUTE[name])
    mass = len(wanted) / BRUTE[name]
    chance = mass / (mass + 1 - weight)
    assert float(won.double().mean()) == pytest.approx(chance, abs=5 * 0.5 / math.sqrt(rows) + 0.02 * chance)
    if len(wanted) > 1000 and int(won.sum()) > 1000:
        assert p_value(y[won], wanted) > ACCEPTABLE
    assert attempt < 400


def test_fresh_noise_belongs_to_its_key() -> None:
    whole = fresh_noise(keys(50), 6, DIM)
    assert whole.shape == (50, 7, DIM)
    assert torch.equal(fresh_noise(keys(50)[[7, 3]], 6, DIM), whole[[7, 3]])
    assert abs(float(whole.mean())) < 0.1 and float(whole.std()) == pytest.approx(1, abs=0.06)
