"""Our linear maps for processors without a matrix unit: the same numbers as torch's, the same bits for any rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bozzetto.runtime import linear, native
from bozzetto.runtime.linear import OwnMap, TorchMap, fixed_map, laid_out, own_linear_pays
from bozzetto.runtime.native import load_kernels
from bozzetto.train import fit
from bozzetto.train.fit import autocast, compute_dtype

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    load_kernels()


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9, 17, 33])
@pytest.mark.parametrize(("columns", "inputs"), [(64, 32), (40, 18), (7, 2), (129, 96)])
def test_products_are_those_of_torch(dtype: torch.dtype, rows: int, columns: int, inputs: int) -> None:
    x, weight = random(rows, inputs, dtype=dtype), random(columns, inputs, dtype=dtype, seed=1)
    bias, more = random(columns, dtype=dtype, seed=2), random(rows, columns, dtype=dtype, seed=3)
    ours = OwnMap(weight, bias, False)
    wanted = F.linear(x.float(), weight.float(), bias.float())
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 2e-2}
    torch.testing.assert_close(ours(x).float(), wanted, **tolerance)
    torch.testing.assert_close(ours(x, more).float(), wanted + more.float(), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [16, 24, 100])
def test_a_gated_map_lets_through_what_its_gates_say(dtype: torch.dtype, columns: int) -> None:
    x, weight = 3 * random(6, 34, dtype=dtype), random(2 * columns, 34, dtype=dtype, seed=1)
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 5e-2}
    torch.testing.assert_close(OwnMap(weight, None, True)(x), TorchMap(weight, None, True)(x), **tolerance)


def test_gates_far_from_zero_neither_overflow_nor_vanish() -> None:
    weight = torch.cat([torch.eye(16), torch.eye(16)])
    x = torch.tensor([-1e4, -300.0, -90.0, -20.0, -1.0, 0.0, 1e-3, 1.0, 20.0, 90.0, 300.0, 1e4, 2.0, 3.0, 4.0, 5.0])
    torch.testing.assert_close(OwnMap(weight, None, True)(x[None])[0], F.silu(x) * x, rtol=1e-5, atol=1e-25)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_a_row_has_the_same_bits_whatever_rows_stand_beside_it(dtype: torch.dtype, gated: bool) -> None:
    ours = OwnMap(random(128, 256, dtype=dtype, seed=1), None, gated)
    x = random(21, 256, dtype=dtype)
    whole = ours(x)
    for first, last in ((0, 1), (3, 5), (7, 20), (20, 21)):
        assert torch.equal(ours(x[first:last]), whole[first:last])
    assert torch.equal(ours(x.view(3, 7, 256)), whole.view(3, 7, -1))


def test_the_layout_holds_every_weight_once() -> None:
    weight = torch.arange(1.0, 64 * 6 + 1).view(64, 6)
    for gated in (False, True):
        assert torch.equal(laid_out(weight, gated).flatten().sort().values, weight.flatten())
    half = laid_out(weight.bfloat16())
    assert half.shape == (2, 3, 2, 16, 2) and torch.equal(half[1, 2, 0, 5], weight[32 + 5, 4:6].bfloat16())


def test_weights_of_another_layout_are_refused() -> None:
    ours = OwnMap(torch.zeros(32, 8), None, False)
    with pytest.raises(RuntimeError, match="not laid out"):
        ours(torch.zeros(2, 10))
    with pytest.raises(RuntimeError, match="wrong shape"):
        ours(torch.zeros(2, 8), torch.zeros(3, 32))


def test_the_faster_map_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for unit, kind in ((True, TorchMap), (False, OwnMap)):
        monkeypatch.setattr(linear, "has_matrix_unit", lambda unit=unit: unit)
        made = fixed_map(torch.ones(4, 8), torch.bfloat16, torch.ones(4))
        assert isinstance(made, kind) and made(torch.ones(1, 8).bfloat16()).tolist() == [[9.0] * 4]
    assert not own_linear_pays(torch.ones(4, 7))  # numbers come in pairs


def test_training_computes_in_the_faster_type(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.products_prefer_bfloat16() is native.products_prefer_bfloat16()  # measured once
    for prefers, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(fit, "products_prefer_bfloat16", lambda prefers=prefers: prefers)
        assert compute_dtype() == dtype
        with autocast():
            assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize(("unit", "prefers", "rows"), [(True, False, 32), (False, True, 16), (False, False, 8)])
def test_rows_that_are_cheap_follow_the_machine(
    unit: bool, prefers: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "has_matrix_unit", lambda: unit)
    monkeypatch.setattr(native, "products_prefer_bfloat16", lambda: prefers)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert native.cheap_rows() == rows
