"""Sampling schedules of denoising chains against Gaussian posteriors, known moments and published numbers."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from bozzetto.errors import UsageError
from bozzetto.laws.schedules import (
    FlowSchedule,
    diffusion_schedule,
    euler_schedule,
    flow_schedule,
    flow_sde_schedule,
    noised_tables,
)
from path_toys import mean_of, token_of

FLOWS = [(1, 0.05, 1.0), (2, 0.3, 1.0), (7, 0.05, 2.5), (16, 0.01, 0.4)]
CPU = torch.device("cpu")


def posterior(prior_mean: float, prior_var: float, factor: float, noise_var: float) -> tuple[float, float, float]:
    """Of s ~ N(prior_mean, prior_var) given x = factor s + noise: factor of x in the mean, rest of it, variance."""
    variance = 1 / (1 / prior_var + factor**2 / noise_var)
    return variance * factor / noise_var, variance * prior_mean / prior_var, variance


def by_token(schedule: FlowSchedule) -> tuple[Tensor, Tensor]:
    """Factors of E[x_1 | x] and of x in the means, float64 [T]."""
    token = schedule.of_velocity / (1 - schedule.time)
    return token, schedule.of_state - token


def later_times(schedule: FlowSchedule) -> Tensor:
    return torch.cat([schedule.time[1:], torch.ones(1, dtype=torch.float64)])


def cosine_products() -> list[float]:
    """The share of the signal's variance that is left at each of the 1000 times."""
    level = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    products, left = [], 1.0
    for before, after in pairwise(level):
        left *= 1 - min(1 - after / before, 0.999)
        products.append(left)
    return products


PRODUCTS = cosine_products()


# The straight path.


@pytest.mark.parametrize(("steps", "last_std", "shift"), FLOWS)
def test_a_flow_step_is_the_gaussian_posterior_given_state_and_token(steps: int, last_std: float, shift: float) -> None:
    schedule = flow_schedule(steps, last_std, shift)
    token, state = by_token(schedule)
    assert len(schedule.time) == schedule.steps == steps
    for k, (t, s) in enumerate(zip(schedule.time.tolist(), later_times(schedule).tolist(), strict=True)):
        if s == 1:
            assert (float(token[k]), float(state[k])) == pytest.approx((1.0, 0.0), abs=1e-12)
            continue
        factor = t / s  # x_t is this share of x_s, and fresh noise
        of_x, of_one, variance = posterior(s, (1 - s) ** 2, factor, (1 - t) ** 2 - factor**2 * (1 - s) ** 2)
        assert float(state[k]) == pytest.approx(of_x, abs=1e-12)
        assert float(token[k]) == pytest.approx(of_one, abs=1e-12)
        assert float(schedule.std[k]) == pytest.approx(math.sqrt(variance), abs=1e-12)


@pytest.mark.parametrize("spread", [0.0, 0.4, 1.0, 2.0])
@pytest.mark.parametrize(("steps", "last_std", "shift"), FLOWS)
def test_moments_of_gaussian_tokens_run_along_the_path(
    steps: int, last_std: float, shift: float, spread: float
) -> None:
    """Means are those of the path; variances lack just what the token still varies given the state."""
    schedule, centre = flow_schedule(steps, last_std, shift), 1.3
    mean, variance = 0.0, 1.0
    token, state = (part.tolist() for part in by_token(schedule))
    for k, (t, s) in enumerate(zip(schedule.time.tolist(), later_times(schedule).tolist(), strict=True)):
        there = t**2 * spread**2 + (1 - t) ** 2  # variance of the path's state
        slope, left = t * spread**2 / there, spread**2 * (1 - t) ** 2 / there  # of E[x_1 | x], and Var[x_1 | x]
        velocity = (slope - 1) / (1 - t)
        assert float(schedule.of_state[k] + schedule.of_velocity[k] * velocity) == pytest.approx(
            token[k] * slope + state[k]
        )
        moved = (token[k] * slope + state[k]) ** 2
        full = moved * there + token[k] ** 2 * left + float(schedule.std[k]) ** 2
        assert full == pytest.approx(s**2 * spread**2 + (1 - s) ** 2 + (last_std**2 if s == 1 else 0))
        mean = token[k] * (centre + slope * (mean - t * centre)) + state[k] * mean
        variance = moved * variance + float(schedule.std[k]) ** 2
        assert mean == pytest.approx(s * centre)
        assert variance <= full * (1 + 1e-12)
        if spread == 0:
            assert variance == pytest.approx((1 - s) ** 2 + (last_std**2 if s == 1 else 0))


def test_the_missing_variance_of_gaussian_tokens_shrinks_as_one_over_the_steps() -> None:
    spread, found = 0.7, []
    for steps in (4, 16, 64, 256):
        schedule, variance = flow_schedule(steps, 1e-6), 1.0
        for k, (token, state) in enumerate(zip(*by_token(schedule), strict=True)):
            t = float(schedule.time[k])
            slope = t * spread**2 / (t**2 * spread**2 + (1 - t) ** 2)
            variance = float(token * slope + state) ** 2 * variance + float(schedule.std[k]) ** 2
        found.append(spread**2 - variance)
    assert all(3 < few / many < 5 for few, many in pairwise(found[1:]))
    assert 0 < found[-1] < 0.03 * spread**2


@pytest.mark.parametrize(("steps", "last_std", "shift"), FLOWS)
def test_a_flows_ancestry_gives_the_same_means(steps: int, last_std: float, shift: float) -> None:
    schedule = flow_schedule(steps, last_std, shift)
    ancestry, step = schedule.ancestry(CPU), torch.arange(steps)
    generator = torch.Generator().manual_seed(0)
    x, velocity = (torch.randn(steps, 5, generator=generator) for _ in range(2))
    mean = schedule.of_state[:, None] * x + schedule.of_velocity[:, None] * velocity
    token = x + (1 - schedule.time[:, None]) * velocity
    assert ancestry.signal.dtype == torch.float32
    torch.testing.assert_close(mean_of(ancestry, token.float(), x, step), mean.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(token_of(ancestry, mean.float(), x, step), token.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ancestry.signal + ancestry.noise, torch.ones(steps))
    torch.testing.assert_close(ancestry.signal, schedule.time.float())


@pytest.mark.parametrize(("steps", "last_std", "shift"), FLOWS)
def test_every_flow_step_adds_noise_and_the_last_as_much_as_asked(steps: int, last_std: float, shift: float) -> None:
    schedule = flow_schedule(steps, last_std, shift)
    assert bool((schedule.std > 0).all()) and float(schedule.std[-1]) == last_std
    assert float(schedule.time[0]) == 0 and bool((schedule.time.diff() > 0).all()) and float(schedule.time[-1]) < 1


# NextStep-1's samplers, written out as they are published: from velocity to score or to noise and token.


def chain(schedule: FlowSchedule, x: Tensor, noise: Tensor, velocity: Any) -> Tensor:
    for k, t in enumerate(schedule.time):
        x = schedule.of_state[k] * x + schedule.of_velocity[k] * velocity(x, t) + schedule.std[k] * noise[k]
    return x


def velocity(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(1.3 * x + t) - 0.4 * x


def shifted(u: Tensor, shift: float) -> Tensor:
    return u / (shift - (shift - 1) * u)


@pytest.mark.parametrize(("steps", "shift", "last"), [(28, 1.0, 0.0), (50, 3.2, 0.04), (2, 1.0, 0.04), (1, 1.0, 0.0)])
def test_euler_steps_are_those_of_drift_and_score(steps: int, shift: float, last: float) -> None:
    x, *noise = torch.randn(steps + 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    schedule, made = euler_schedule(steps, shift, last), x
    grid = torch.linspace(0, 1 - last, steps if last else steps + 1, dtype=torch.float64)
    for k, (t, s) in enumerate(pairwise(shifted(grid, shift))):
        v = velocity(made, t)
        score = (t * v - made) / ((1 - t) ** 2 + t * (1 - t))
        made = made + (v + (1 - t) * score) * (s - t) + (2 * (1 - t)).sqrt() * (s - t).sqrt() * noise[k]
    if last:
        made = made + last * velocity(made, shifted(grid, shift)[-1])
    torch.testing.assert_close(chain(schedule, x, torch.stack(noise), velocity), made)
    assert schedule.steps == steps and schedule.moving == (last == 0)
    if last == 0 and shift == 1:  # the last step ends at time 1 and adds noise still
        assert float(schedule.std[-1]) == pytest.approx(math.sqrt(2) / steps)


@pytest.mark.parametrize(("steps", "shift", "level"), [(30, 1.0, 0.8), (12, 2.5, 0.3), (1, 1.0, 0.8)])
def test_flow_sde_steps_mix_predicted_noise_and_token(steps: int, shift: float, level: float) -> None:
    x, *noise = torch.randn(steps + 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    schedule, made = flow_sde_schedule(steps, shift, level), x
    times = shifted(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift)
    for k, (t, s) in enumerate(pairwise(times)):
        v, dt, sigma = velocity(made, t), s - t, 1 - t
        x_0, x_1 = made - v * t, made + v * (1 - t)
        std = (sigma / (1 - (times[-2] if sigma == 1 else sigma))).sqrt() * level
        mean = x_0 * (1 - s) + x_1 * s - std**2 * dt / (2 * sigma) * x_0
        made = mean + std * dt.sqrt() * noise[k]
    torch.testing.assert_close(chain(schedule, x, torch.stack(noise), velocity), made)
    assert schedule.steps == steps and schedule.moving


def test_finer_euler_steps_come_nearer_to_the_law_of_gaussian_tokens() -> None:
    """For tokens N(0, s^2) the velocity is linear in the state, so that the variance runs by a recursion."""
    spread, found = 0.7, []
    for steps in (16, 64, 256):
        schedule, variance = euler_schedule(steps), 1.0
        for k, t in enumerate(schedule.time.tolist()):
            slope = (t * spread**2 - (1 - t)) / (t**2 * spread**2 + (1 - t) ** 2)
            factor = float(schedule.of_state[k] + schedule.of_velocity[k] * slope)
            variance = factor**2 * variance + float(schedule.std[k]) ** 2
        found.append(abs(variance - spread**2))
    assert found[0] > 2 * found[1] > 4 * found[2] and found[2] < 0.02


@pytest.mark.parametrize("schedule", [euler_schedule(9), euler_schedule(9, 2.0, 0.04), flow_sde_schedule(9, 1.5)])
def test_the_ancestry_of_a_published_sampler_gives_its_means(schedule: FlowSchedule) -> None:
    ancestry, step = schedule.ancestry(CPU), torch.arange(9)
    x, v = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
    mean = schedule.of_state[:, None] * x + schedule.of_velocity[:, None] * v
    token = x + (1 - schedule.time[:, None]) * v
    torch.testing.assert_close(mean_of(ancestry, token.float(), x, step), mean.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: euler_schedule(0), "steps = 0"),
        (lambda: euler_schedule(5, 0.0), "shift = 0"),
        (lambda: euler_schedule(5, 1.0, 1.0), "last = 1"),
        (lambda: flow_sde_schedule(5, level=0.0), "level = 0"),
        (lambda: flow_sde_schedule(5, level=1.5), "level = 1.5"),
    ],
)
def test_bad_numbers_of_published_samplers_are_named(make: Any, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        make()


def test_a_shift_above_one_spends_more_steps_near_the_noise() -> None:
    even, late, early = (flow_schedule(16, shift=shift).time for shift in (1.0, 3.0, 1 / 3))
    torch.testing.assert_close(even, torch.arange(16, dtype=torch.float64) / 16)
    assert bool((late[1:] < even[1:]).all()) and bool((early[1:] > even[1:]).all())
    assert [int((time < 0.5).sum()) for time in (early, even, late)] == [4, 8, 12]
    odds = [time[1:] / (1 - time[1:]) for time in (even, late)]
    torch.testing.assert_close(odds[1], odds[0] / 3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("steps", -3),
        ("last_std", 0.0),
        ("last_std", 1.0),
        ("last_std", -0.1),
        ("last_std", math.nan),
        ("shift", 0.0),
        ("shift", -1.0),
        ("shift", math.inf),
        ("shift", math.nan),
    ],
)
def test_flow_settings_name_the_bad_value(field: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{field} = {value} "):
        flow_schedule(**{"steps": 4, field: value})


# The cosine diffusion. By time: noise level, smallest and largest deviation, factor of the predicted noise.

PUBLISHED = {
    999: (1.0, None, None, 316.0),
    989: (None, 0.866, None, 1.5),
    505: (0.718, 0.182, 0.185, 0.048),
    101: (0.170, 0.065, 0.072, 0.030),
    20: (0.043, 0.021, 0.034, 0.027),
    10: (0.027, 0.0062, 0.026, 0.025),
    0: (0.0064, None, None, 0.0064),
}


@pytest.mark.parametrize("time", PUBLISHED)
def test_a_hundred_steps_have_the_published_numbers(time: int) -> None:
    schedule = diffusion_schedule(100)
    k = schedule.time.tolist().index(time)
    found = (
        (1 - schedule.recip**-2).sqrt(),
        (schedule.log_small / 2).exp(),
        (schedule.log_large / 2).exp(),
        schedule.of_token * schedule.recip_minus,
    )
    for values, wanted in zip(found, PUBLISHED[time], strict=True):
        assert wanted is None or float(values[k]) == pytest.approx(wanted, rel=0.03)


def test_times_of_a_hundred_steps_are_spread_evenly() -> None:
    times = diffusion_schedule(100).time.tolist()
    assert times[-4:] == [30, 20, 10, 0] and times[:2] == [999, 989]
    assert len(times) == 100 and times == sorted(times, reverse=True)
    gaps = {a - b for a, b in pairwise(times)}
    assert gaps <= {10, 11}
    late = diffusion_schedule(25, noisiest=970).time.tolist()
    assert (late[0], late[-1], len(late)) == (970, 0, 25)
    assert diffusion_schedule(1000).time.tolist() == list(range(999, -1, -1))


@pytest.mark.parametrize(("steps", "noisiest"), [(2, 999), (10, 600), (100, 999), (1000, 999)])
def test_a_diffusion_step_is_bayes_rule(steps: int, noisiest: int) -> None:
    schedule = diffusion_schedule(steps, noisiest)
    times = [int(time) for time in schedule.time]
    for k, (time, cleaner) in enumerate(pairwise(times)):
        product, before = PRODUCTS[time], PRODUCTS[cleaner]
        kept = product / before
        of_x, of_token, variance = posterior(math.sqrt(before), 1 - before, math.sqrt(kept), 1 - kept)
        assert float(schedule.of_state[k]) == pytest.approx(of_x, rel=1e-6)
        assert float(schedule.of_token[k]) == pytest.approx(of_token, rel=1e-6)
        assert float(schedule.log_small[k].exp()) == pytest.approx(variance, rel=1e-6)
        assert float(schedule.log_large[k].exp()) == pytest.approx(1 - kept, rel=1e-6)
    assert (float(schedule.of_token[-1]), float(schedule.of_state[-1])) == pytest.approx((1, 0), abs=1e-12)


def test_the_bounds_of_the_variance_are_ordered_and_the_last_borrows_its_lower_one() -> None:
    for steps in (2, 10, 100, 1000):
        schedule = diffusion_schedule(steps)
        assert bool((schedule.log_small[:-1] <= schedule.log_large[:-1]).all())
        assert float(schedule.log_small[-1]) == float(schedule.log_small[-2])
        assert all(bool(value.isfinite().all()) for value in vars(schedule).values())


def test_a_diffusions_ancestry_keeps_the_variance_and_undoes_itself() -> None:
    schedule = diffusion_schedule(20, 900)
    ancestry, step = schedule.ancestry(CPU), torch.arange(20)
    torch.testing.assert_close(ancestry.signal.square() + ancestry.noise.square(), torch.ones(20))
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(20, 5, generator=generator) for _ in range(2))
    token = schedule.recip[:, None] * x - schedule.recip_minus[:, None] * noise
    torch.testing.assert_close(
        ancestry.signal[:, None] * token + ancestry.noise[:, None] * noise, x.double(), atol=1e-5, rtol=1e-5
    )
    mean = schedule.of_token[:, None] * token + schedule.of_state[:, None] * x
    torch.testing.assert_close(mean_of(ancestry, token.float(), x, step), mean.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("steps", "noisiest", "said"),
    [
        (0, 999, "steps = 0 .*1 to 1000"),
        (-1, 999, "steps = -1 "),
        (1001, 999, "steps = 1001 .*1 to 1000"),
        (52, 50, "steps = 52 .*1 to 51"),
        (4, -1, "noisiest = -1 .*0 to 999"),
        (4, 1000, "noisiest = 1000 .*0 to 999"),
    ],
)
def test_diffusion_settings_name_the_bad_value(steps: int, noisiest: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        diffusion_schedule(steps, noisiest)


# What training is told.


def test_tables_by_time_agree_with_the_schedule_of_all_times() -> None:
    (signal, noise, _, low, high), schedule = noised_tables(), diffusion_schedule(1000)
    products = torch.tensor(PRODUCTS, dtype=torch.float64)
    torch.testing.assert_close(signal.double(), products.sqrt(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(noise.double(), (1 - products).sqrt(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(signal.double().flip(0), 1 / schedule.recip, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(low.double().flip(0), schedule.log_small, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(high.double().flip(0), schedule.log_large, rtol=1e-5, atol=1e-6)
    assert all(table.dtype == torch.float32 and table.shape == (1000,) for table in noised_tables())


def test_the_mean_follows_the_noise_as_the_published_formula_says() -> None:
    """mean = (x_t - beta / sqrt(1 - product) eps) / sqrt(1 - beta)."""
    (_, _, of_noise, _, _), schedule = noised_tables(), diffusion_schedule(1000)
    products = torch.tensor(PRODUCTS, dtype=torch.float64)
    kept = products / torch.cat([torch.ones(1, dtype=torch.float64), products[:-1]])
    wanted = (1 - kept) / ((1 - products) * kept).sqrt()
    torch.testing.assert_close(of_noise.double(), wanted, rtol=1e-5, atol=1e-9)
    of_state = (schedule.of_token * schedule.recip + schedule.of_state).flip(0)
    torch.testing.assert_close(of_state, kept.rsqrt(), rtol=1e-6, atol=0)
