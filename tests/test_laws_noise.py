"""Noise is a pure function of (seed, stream, image index, position, token), uniform, independent and pinned."""

from __future__ import annotations

import itertools

import pytest
import torch

from bozzetto.laws.noise import (
    STREAM_TOKEN,
    STREAM_VERIFY,
    GumbelField,
    fold,
    gumbel,
    gumbel_rows,
    image_keys,
    uniform,
)
from toys import fit_p_value

_MASK = 2**64 - 1


def slow_mix(x: int) -> int:
    """splitmix64's finaliser on Python integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def slow_fold(key: int, counter: int) -> int:
    return slow_mix(((key ^ slow_mix(counter & _MASK)) + 0x9E3779B97F4A7C15) & _MASK)


def field(seed: int, index: list[int], length: int = 40, vocab: int = 6) -> GumbelField:
    made = GumbelField(seed, torch.tensor(index), length, vocab)
    made.fill(length)
    return made


def test_noise_is_pinned() -> None:
    """These numbers fix every published image: they must never change."""
    keys = image_keys(7, STREAM_TOKEN, torch.tensor([0, 1, 123456]))
    assert keys.tolist() == [-7205399239080518280, -8901230316934504137, 1862993189230804355]
    assert fold(keys, 5).tolist() == [-5963269539986398482, -8992220304882883187, 5300831117624724092]
    assert uniform(keys).tolist() == pytest.approx([0.6093945245681751, 0.5174633376292888, 0.1009930631544868], 1e-12)
    assert gumbel(keys).tolist() == pytest.approx([0.7026130557060242, 0.41731008887290955, -0.8297316431999207], 1e-6)
    rows = field(7, [0, 3], length=4, vocab=5).table[:, 3, :3].flatten().tolist()
    wanted = [0.06892649829387665, -0.04862436279654503, 2.2728936672210693]
    assert rows == pytest.approx([*wanted, 0.1973535269498825, 0.20957785844802856, 3.4660518169403076], 1e-5)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1])
def test_keys_equal_a_python_integer_reference(seed: int) -> None:
    index = [0, 1, 7, 2**40]
    got = image_keys(seed, STREAM_VERIFY, torch.tensor(index))
    root = slow_mix((seed + 0x9E3779B97F4A7C15) & _MASK)
    wanted = [slow_fold(slow_fold(root, STREAM_VERIFY), i) for i in index]
    assert [k & _MASK for k in got.tolist()] == wanted
    assert [k & _MASK for k in fold(got, 9).tolist()] == [slow_fold(k, 9) for k in wanted]


def test_an_images_noise_does_not_depend_on_its_batch_or_slot() -> None:
    whole = field(3, list(range(10))).table
    for order in ([4], [9, 0, 4], [4, 4, 2]):
        assert torch.equal(field(3, order).table, whole[order])


def test_noise_does_not_depend_on_the_order_of_filling_length_or_vocabulary() -> None:
    whole = field(3, [5, 6]).table
    lazy = GumbelField(3, torch.tensor([5, 6]), 40, 6)
    for upto in (1, 3, 20, 19, 1000):
        lazy.fill(upto)
    assert torch.equal(lazy.table, whole)
    assert torch.equal(field(3, [5, 6], length=7, vocab=4).table, whole[:, :7, :4])


def test_rows_are_read_by_position_and_repeat_the_last_past_the_end() -> None:
    noise = field(0, [1, 2])
    rows = noise.rows(torch.tensor([[0, 39], [38, 45]]))
    assert torch.equal(rows[0], noise.table[0, [0, 39]])
    assert torch.equal(rows[1], noise.table[1, [38, 39]])


@pytest.mark.parametrize("seed", [0, 7, 2**40])
def test_rows_made_one_by_one_are_those_of_the_field(seed: int) -> None:
    index, position = torch.tensor([0, 3, 123456, 3]), torch.tensor([0, 39, 17, 16])
    rows = gumbel_rows(fold(image_keys(seed, STREAM_TOKEN, index), position), torch.arange(6))
    assert torch.equal(rows, field(seed, index.tolist()).table[torch.arange(4), position])


def test_keep_drops_images_and_filling_goes_on() -> None:
    noise = GumbelField(3, torch.arange(4), 40, 6)
    noise.fill(10)
    noise.keep(torch.tensor([1, 3]))
    noise.fill(40)
    assert torch.equal(noise.table, field(3, [1, 3]).table)


def uniforms(seed: int, stream: int, images: int = 128, positions: int = 128) -> torch.Tensor:
    return uniform(fold(image_keys(seed, stream, torch.arange(images))[:, None], torch.arange(positions)))


@pytest.mark.parametrize(("seed", "stream"), list(itertools.product([0, 1, 12345], [STREAM_TOKEN, STREAM_VERIFY])))
def test_noise_is_uniform_over_images_and_positions(seed: int, stream: int) -> None:
    u = uniforms(seed, stream)
    flat = torch.full((64,), 1 / 64)
    assert fit_p_value(torch.bincount((u * 64).long().flatten(), minlength=64), flat) > 1e-4
    for pair in (torch.stack([u[:-1], u[1:]]), torch.stack([u[:, :-1], u[:, 1:]])):  # neighbours are independent
        eighths = (pair * 8).long()
        assert fit_p_value(torch.bincount((eighths[0] * 8 + eighths[1]).flatten(), minlength=64), flat) > 1e-4


def test_seeds_streams_images_and_positions_are_uncorrelated() -> None:
    u = uniforms(0, STREAM_TOKEN)
    others = [uniforms(1, STREAM_TOKEN), uniforms(0, STREAM_VERIFY), u.roll(1, 0), u.roll(1, 1), u.T]
    others.append(uniforms(2**32, STREAM_TOKEN))
    for other in others:
        apart = (u != other).flatten()  # a transposed table shares its diagonal
        pair = torch.stack([u.flatten()[apart], other.flatten()[apart]])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 4 / pair.shape[1] ** 0.5


def test_gumbel_noise_has_the_gumbel_law() -> None:
    g = gumbel(image_keys(0, STREAM_TOKEN, torch.arange(65_536))).double()
    counts = torch.bincount((torch.exp(-torch.exp(-g)) * 64).long().clamp_max(63), minlength=64)
    assert fit_p_value(counts, torch.full((64,), 1 / 64)) > 1e-4


def test_uniforms_lie_strictly_inside_the_unit_interval() -> None:
    extremes = torch.tensor([0, -1, 2**63 - 1, -(2**63), 2**11 - 1, -(2**11)])
    u = uniform(extremes)
    assert float(u.min()) > 0
    assert float(u.max()) < 1
    assert bool(torch.isfinite(gumbel(extremes)).all())


def test_another_devices_logarithm_moves_noise_by_no_more_than_its_last_digit() -> None:
    """Keys and uniforms are integers and their exact quotients on every device. Logarithms in float64 differ between
    libraries in the last bit or two (CUDA documents one unit, SLEEF, which torch uses on processors, one): almost no
    number of float32 comes out otherwise, and none by more than rounding."""
    keys = fold(torch.tensor(3), torch.arange(300_000))
    inner = uniform(keys).log()
    for up in (float("inf"), -float("inf")):
        moved = inner
        for _ in range(2):
            moved = torch.nextafter(moved, torch.tensor(up, dtype=torch.float64))
        outer = (-moved).log()
        for _ in range(2):
            outer = torch.nextafter(outer, torch.tensor(up, dtype=torch.float64))
        there, here = (-outer).float(), gumbel(keys)
        unit = torch.nextafter(here.abs(), torch.tensor(torch.inf)) - here.abs()
        assert bool(((there - here).abs() <= unit.clamp_min(2e-15)).all())
        assert float((there != here).float().mean()) < 1e-4


def test_few_keys_and_many_are_folded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, counters = torch.randint(-(2**62), 2**62, (3, 5)), torch.arange(5)
    given = [(keys, counters), (keys[..., None], counters), (keys, 7), (keys[0], torch.tensor(-3)), (keys[:0], 2)]
    few = [fold(*pair) for pair in given]
    coins = [uniform(key) for key in few]
    monkeypatch.setattr("bozzetto.laws.noise._FEW", -1)
    assert all(torch.equal(fold(*pair), key) for pair, key in zip(given, few, strict=True))
    assert all(torch.equal(uniform(key), coin) for key, coin in zip(few, coins, strict=True))
