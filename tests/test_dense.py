"""Linear maps laid out for decoding give the numbers of torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.runtime import dense
from bozzetto.runtime.dense import Dense

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 24), (3, 24), (32, 24), (70, 24), (2, 5, 24), (1, 1, 24), (7, 10, 24)]
Parts = tuple[Tensor, Tensor, Tensor | None]


@pytest.fixture(params=[True, False], ids=["own-layout", "plain-layout"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With oneDNN's layout where there is one, and without."""
    if not request.param:
        monkeypatch.setattr(dense, "_packs", lambda weight: False)


def parts(shape: tuple[int, ...], dtype: torch.dtype, biased: bool) -> Parts:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator).to(dtype)
    weight, bias = (torch.randn(size, generator=generator) / 5 for size in ((40, 24), (40,)))
    return x, weight, bias if biased else None


def by_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_map_equals_the_linear_layer_to_the_bit(dtype: torch.dtype, shape: tuple[int, ...], biased: bool) -> None:
    x, weight, bias = parts(shape, dtype, biased)
    found = Dense(weight, bias, dtype)(x)
    assert found.dtype == dtype and found.shape == (*shape[:-1], 40)
    assert torch.equal(found, by_torch(x, weight, bias))


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_is_that_of_the_map(dtype: torch.dtype, shape: tuple[int, ...], biased: bool) -> None:
    x, weight, bias = parts(shape, dtype, biased)
    found = Dense(weight, bias, dtype).silu(x)
    assert found.dtype == dtype and found.shape == (*shape[:-1], 40)
    wanted = F.silu(by_torch(x, weight, bias).float())
    near = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.float(), wanted, atol=near, rtol=near)


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_layouts_give_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = parts((9, 24), dtype, True)
    own = Dense(weight, bias, dtype)
    monkeypatch.setattr(dense, "_packs", lambda weight: False)
    plain = Dense(weight, bias, dtype)
    assert not plain.packed
    assert torch.equal(own(x), plain(x))
    torch.testing.assert_close(own.silu(x), plain.silu(x), atol=2e-2 if own.packed else 0, rtol=2e-2)


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_need_not_be_contiguous_and_may_be_empty(dtype: torch.dtype) -> None:
    x, weight, bias = parts((3, 10, 24), dtype, True)
    layer = Dense(weight, bias, dtype)
    for turned in (x.transpose(0, 1), x[:, ::2], x[:, 4], x.flip(-1)):
        near = 1e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(layer(turned), by_torch(turned.contiguous(), weight, bias), atol=near, rtol=near)
    assert layer(x[0, :0]).shape == (0, 40) and layer.silu(x[0, :0]).shape == (0, 40)


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_map_of_a_layer_is_a_copy_without_gradients(dtype: torch.dtype) -> None:
    layer = nn.Linear(24, 40)
    made = Dense.of(layer, dtype)
    assert (made.shape, made.dtype) == ((40, 24), dtype)
    x = parts((2, 24), dtype, False)[0]
    found = made(x)
    assert not found.requires_grad
    assert torch.equal(found, by_torch(x, layer.weight, layer.bias))
    assert Dense.of(nn.Linear(24, 40, bias=False), dtype).bias is None


def test_float32_weights_keep_their_layout() -> None:
    assert not Dense(torch.ones(4, 8), None, torch.float32).packed


@pytest.mark.parametrize("missing", ["oneDNN", "bfloat16"])
def test_without_onednn_or_its_bfloat16_the_layout_is_plain(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    else:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False)
    x, weight, bias = parts((3, 24), torch.bfloat16, True)
    made = Dense(weight, bias, torch.bfloat16)
    assert not made.packed
    assert torch.equal(made(x), by_torch(x, weight, bias))
