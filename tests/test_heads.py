"""Heads packed for decoding: the denoiser's numbers, laws of single rows and of all places, guidance, bfloat16."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bozzetto.laws.schedules import DiffusionSchedule, FlowSchedule, diffusion_schedule, flow_schedule
from bozzetto.targets.denoiser import Denoiser, DenoiserConfig, time_features
from bozzetto.targets.heads import DiffusionLaw, FlowLaw, PackedDenoiser
from path_toys import token_of

D, CONDITION, STEPS = 5, 7, 6
SHAPE, PLACES = (2, 3), 6
FLOW, DIFFUSION = flow_schedule(STEPS, 0.1), diffusion_schedule(STEPS, 970)
STILL = STEPS - 1  # the step of a diffusion that adds no noise
Law = FlowLaw | DiffusionLaw


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_denoiser(out_dim: int, depth: int = 2, width: int = 32) -> Denoiser:
    """Every weight matters; predictions are of the size of tokens."""
    net = Denoiser(DenoiserConfig(D, out_dim, CONDITION, width, depth))
    generator = torch.Generator().manual_seed(0)
    for name, weight in net.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            weight.data = noise / math.sqrt(weight.shape[1])
        else:
            weight.data = 1 + 0.2 * noise if name.endswith("in_ln.weight") else 0.2 * noise
    return net.eval().requires_grad_(False)


NETS = {FlowLaw: random_denoiser(D), DiffusionLaw: random_denoiser(2 * D)}
KINDS: list[type[Law]] = [FlowLaw, DiffusionLaw]
GUIDANCES = [1.0, 2.0, "per place"]


def schedule_of(kind: type[Law]) -> FlowSchedule | DiffusionSchedule:
    return FLOW if kind is FlowLaw else DIFFUSION


def times_of(kind: type[Law]) -> Tensor:
    return FLOW.time * 1000 if kind is FlowLaw else DIFFUSION.time


def make(kind: type[Law], guidance: Any = 1.0, temperature: float = 1.0, dtype: torch.dtype = torch.float32) -> Any:
    """A law of 2 x 3 places; guidance: 1 is off, "per place" is a scale for each."""
    head = PackedDenoiser(NETS[kind], times_of(kind), dtype)
    scale = torch.linspace(1, 3, PLACES) if guidance == "per place" else guidance
    copies = 1 if guidance == 1 else 2
    return kind(schedule_of(kind), head, normal(1, copies * PLACES, CONDITION), SHAPE, scale, temperature)


def by_hand(kind: type[Law], guidance: Any, x: Tensor, step: Tensor, place: Tensor) -> Tensor:
    """Guided predictions of the denoiser itself."""
    condition = normal(1, (1 if guidance == 1 else 2) * PLACES, CONDITION)
    times = times_of(kind)[step]
    found = NETS[kind](x, times, condition[place])
    if guidance != 1:
        scale = torch.linspace(1, 3, PLACES)[place, None] if guidance == "per place" else guidance
        without = NETS[kind](x, times, condition[PLACES + place])[:, :D]
        found[:, :D] = without + scale * (found[:, :D] - without)
    return found


def rows_of_places() -> tuple[Tensor, Tensor, Tensor]:
    """States, steps and places of 11 rows in no order; places come more than once."""
    generator = torch.Generator().manual_seed(2)
    steps, places = (torch.randint(most, (11,), generator=generator) for most in (STEPS, PLACES))
    return normal(3, 11, D), steps, places


# The denoiser.


def test_a_new_denoiser_is_the_zero_map() -> None:
    net = Denoiser(DenoiserConfig(D, 2 * D, CONDITION, 16, 2))
    assert not bool(net(normal(0, 4, D), torch.tensor([0.0, 10.0, 500.0, 999.0]), normal(1, 4, CONDITION)).any())


def test_features_of_times_are_cosines_and_sines() -> None:
    found = time_features(torch.tensor([0.0, 3.0, 999.0]), 8)
    for row, time in zip(found, (0, 3, 999), strict=True):
        angles = [time * 10000 ** (-i / 4) for i in range(4)]
        wanted = [f(a) for f in (math.cos, math.sin) for a in angles]
        assert row.tolist() == pytest.approx(wanted, abs=1e-4)


def test_the_denoiser_is_its_formula() -> None:
    net = random_denoiser(D, depth=1, width=16)
    w = {name: value.double() for name, value in net.named_parameters()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean()) / (x.var(correction=0) + 1e-6).sqrt()

    x, condition, time = normal(4, D).double(), normal(5, CONDITION).double(), torch.tensor([321.0])
    told = linear("time_embed.mlp.2", F.silu(linear("time_embed.mlp.0", time_features(time)[0].double())))
    told = F.silu(told + linear("cond_embed", condition))
    h = linear("input_proj", x)
    shift, scale, gate = linear("res_blocks.0.adaLN_modulation.1", told).chunk(3)
    inner = (norm(h) * w["res_blocks.0.in_ln.weight"] + w["res_blocks.0.in_ln.bias"]) * (1 + scale) + shift
    h = h + gate * linear("res_blocks.0.mlp.2", F.silu(linear("res_blocks.0.mlp.0", inner)))
    shift, scale = linear("final_layer.adaLN_modulation.1", told).chunk(2)
    wanted = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    found = net(x[None].float(), time, condition[None].float())[0]
    torch.testing.assert_close(found, wanted.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize(("out_dim", "depth"), [(D, 1), (D, 3), (2 * D, 2)])
def test_packed_predictions_are_the_denoisers(out_dim: int, depth: int, rows: int) -> None:
    net, times = random_denoiser(out_dim, depth), torch.tensor([0.0, 62.5, 500.0, 999.0])
    head = PackedDenoiser(net, times, torch.float32)
    assert (head.steps, head.token_dim, head.out_dim) == (4, D, out_dim)
    x, condition = normal(1, rows, D), normal(2, rows, CONDITION)
    table = head.modulations(head.embed(condition), torch.arange(4))
    assert table.shape == (4, rows, (3 * depth + 2) * 32)
    for k, time in enumerate(times):
        wanted = net(x, time.expand(rows), condition)
        assert float(wanted.std()) > 0.3
        torch.testing.assert_close(head(x, table[k]), wanted, atol=1e-5, rtol=1e-5)


def test_packing_leaves_the_denoiser_as_it_is() -> None:
    net = random_denoiser(D)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    PackedDenoiser(net, torch.tensor([0.0]), torch.bfloat16)
    PackedDenoiser(net, torch.tensor([0.0]), torch.float32)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# Laws of rows and of all places.


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_guided_and_variances_are_those_of_the_condition(kind: type[Law], guidance: Any) -> None:
    x, step, place = rows_of_places()
    found = make(kind, guidance).predict(x, step, place)
    torch.testing.assert_close(found, by_hand(kind, guidance, x, step, place), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("kind", KINDS)
def test_all_places_at_once_are_the_places_row_by_row(kind: type[Law], guidance: Any) -> None:
    law, x = make(kind, guidance, 0.8), normal(5, PLACES, D)
    for k in range(STEPS):
        whole = law.all_places(x, k)
        for place in range(PLACES):
            alone = law.kernel(x[place : place + 1], torch.tensor([k]), torch.tensor([place]))
            torch.testing.assert_close(whole.mean[place : place + 1], alone.mean, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(whole.std[place : place + 1], alone.std, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_call_do_not_depend_on_each_other(kind: type[Law], guidance: Any) -> None:
    law, (x, step, place) = make(kind, guidance), rows_of_places()
    whole = law.kernel(x, step, place)
    order = torch.tensor([4, 0, 4, 9])
    part = law.kernel(x[order], step[order], place[order])
    torch.testing.assert_close(part.mean, whole.mean[order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(part.std, whole.std[order], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_a_flow_kernel_is_the_schedules_step(guidance: Any) -> None:
    x, step, place = rows_of_places()
    kernel = make(FlowLaw, guidance).kernel(x, step, place)
    velocity = by_hand(FlowLaw, guidance, x, step, place)
    mean = FLOW.of_state[step, None] * x + FLOW.of_velocity[step, None] * velocity
    torch.testing.assert_close(kernel.mean, mean.float(), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(kernel.std, FLOW.std[step, None].float())


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_a_diffusion_kernel_is_the_posterior_under_the_predicted_noise(guidance: Any) -> None:
    x, step, place = rows_of_places()
    s, kernel = DIFFUSION, make(DiffusionLaw, guidance).kernel(x, step, place)
    noise, mix = by_hand(DiffusionLaw, guidance, x, step, place).double().chunk(2, -1)
    token = s.recip[step, None] * x - s.recip_minus[step, None] * noise
    mean = s.of_token[step, None] * token + s.of_state[step, None] * x
    torch.testing.assert_close(kernel.mean, mean.float(), atol=1e-4, rtol=1e-4)
    share = (mix + 1) / 2
    variance = (share * s.log_large[step, None] + (1 - share) * s.log_small[step, None]).exp()
    variance[step == STILL] = 0
    torch.testing.assert_close(kernel.std, variance.sqrt().float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_laws_ancestry_is_the_schedules(kind: type[Law]) -> None:
    for found, wanted in zip(make(kind).ancestry, schedule_of(kind).ancestry(torch.device("cpu")), strict=True):
        assert torch.equal(found, wanted)


def test_an_exact_prediction_leads_back_to_the_token_through_the_ancestry() -> None:
    law, (x, step, place) = make(FlowLaw), rows_of_places()
    token = token_of(law.ancestry, law.kernel(x, step, place).mean, x, step)
    wanted = x + (1 - FLOW.time[step, None]) * by_hand(FlowLaw, 1.0, x, step, place)
    torch.testing.assert_close(token, wanted.float(), atol=1e-4, rtol=1e-4)


# Temperature, counts, deviations.


@pytest.mark.parametrize("way", ["kernel", "all_places"])
@pytest.mark.parametrize("kind", KINDS)
def test_temperature_multiplies_deviations_and_leaves_means(kind: type[Law], way: str) -> None:
    x, step, place = normal(6, PLACES, D), torch.full((PLACES,), 2), torch.arange(PLACES)

    def found(temperature: float) -> Any:
        law = make(kind, 2.0, temperature)
        return law.kernel(x, step, place) if way == "kernel" else law.all_places(x, 2)

    plain, cold = found(1.0), found(0.7)
    assert torch.equal(plain.mean, cold.mean)
    torch.testing.assert_close(cold.std, 0.7 * plain.std)


@pytest.mark.parametrize(("guidance", "copies"), [(1.0, 1), (2.0, 2), ("per place", 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_calls_and_their_rows_are_counted(kind: type[Law], guidance: Any, copies: int) -> None:
    law, (x, step, place) = make(kind, guidance), rows_of_places()
    assert (law.calls, law.rows) == (0, 0)
    law.kernel(x, step, place)
    assert (law.calls, law.rows) == (1, 11 * copies)
    law.all_places(x[:PLACES], 0)
    law.kernel(x[:1], step[:1], place[:1])
    assert (law.calls, law.rows) == (3, (11 + PLACES + 1) * copies)
    law.std_later(torch.ones(1, 1), step[:1], torch.tensor([[1, 2]]))
    assert law.calls == 3


def test_later_deviations_of_a_flow_are_the_schedules() -> None:
    law = make(FlowLaw, temperature=0.9)
    later = torch.tensor([[1, 2, 5], [4, 4, 3]])
    found = law.std_later(torch.full((2, 1), 7.0), torch.tensor([0, 2]), later)
    assert law.isotropic and found.shape == (2, 3, 1)
    torch.testing.assert_close(found[..., 0], 0.9 * FLOW.std[later].float())


def test_later_deviations_of_a_diffusion_lie_within_its_bounds() -> None:
    law = make(DiffusionLaw, temperature=0.9)
    x, _, place = rows_of_places()
    for k in range(STILL):
        step = torch.full_like(place, k)
        std = law.kernel(x, step, place).std
        later = torch.arange(STEPS).expand(len(x), -1)
        found = law.std_later(std, step, later)
        assert not law.isotropic and found.shape == (len(x), STEPS, D)
        low, high = (
            0.9 * (part / 2).exp().float()[:STILL, None] for part in (DIFFUSION.log_small, DIFFUSION.log_large)
        )
        assert bool((found[:, :STILL] >= low * (1 - 1e-5)).all()) and bool(
            (found[:, :STILL] <= high * (1 + 1e-5)).all()
        )
        assert not bool(found[:, STILL].any())


def test_a_deviation_is_guessed_as_itself_at_its_own_step() -> None:
    law = make(DiffusionLaw, temperature=1.2)
    gap = (DIFFUSION.log_large - DIFFUSION.log_small)[:STILL]
    wide = [k for k in range(STILL) if float(gap[k]) > 0.02]
    assert len(wide) >= 2
    for k in wide:
        share = torch.rand(4, D, generator=torch.Generator().manual_seed(k))
        std = 1.2 * ((DIFFUSION.log_small[k] + share * gap[k]) / 2).exp().float()
        step = torch.full((4,), k)
        torch.testing.assert_close(law.std_later(std, step, step[:, None])[:, 0], std, atol=1e-6, rtol=2e-5)


def test_the_last_step_of_a_diffusion_adds_no_noise() -> None:
    law, x = make(DiffusionLaw, 2.0), normal(7, PLACES, D)
    for k in range(STEPS):
        row = law.kernel(x, torch.full((PLACES,), k), torch.arange(PLACES)).std
        assert bool((row == 0).all() if k == STILL else (row > 0).all())
        assert torch.equal(law.all_places(x, k).std == 0, row == 0)


# Bfloat16.


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_predictions_are_near(kind: type[Law], guidance: float, rows: int) -> None:
    generator = torch.Generator().manual_seed(8)
    step, place = (torch.randint(most, (rows,), generator=generator) for most in (STEPS, PLACES))
    x = normal(9, rows, D)

    def predict(dtype: torch.dtype) -> Tensor:
        return make(kind, guidance, dtype=dtype).predict(x, step, place)

    found, wanted = predict(torch.bfloat16), predict(torch.float32)
    assert found.dtype == torch.float32
    assert 0 < relative(found, wanted) < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_laws_are_float32_and_keep_the_deviations_of_a_flow(kind: type[Law]) -> None:
    x = normal(10, PLACES, D)
    near, exact = (make(kind, dtype=dtype).all_places(x, 1) for dtype in (torch.bfloat16, torch.float32))
    assert near.mean.dtype == near.std.dtype == torch.float32
    assert relative(near.mean, exact.mean) < 0.03 and relative(near.std, exact.std) < 0.03
    assert kind is not FlowLaw or torch.equal(near.std, exact.std)
