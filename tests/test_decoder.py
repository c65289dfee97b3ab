"""The two forms of a cached decoder: torch's and our kernels', chains and trees, against each other and themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bozzetto.drafts import Layout
from bozzetto.runtime.engine import LayerParts, LinearMap
from bozzetto.targets import decoder
from bozzetto.targets.decoder import Inputs, OwnDecoder, Places, Shape, TorchDecoder

SHAPES = {  # dim, heads, heads of keys, numbers of a head, ffn
    "plain": (64, 2, 2, 32, 96),
    "shared heads": (64, 4, 2, 16, 48),
    "odd head": (48, 2, 1, 20, 40),
}
BATCH, LENGTH, SLOTS = 2, 40, 64
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.06}


def parts(shape: Shape, ffn: int, count: int = 2, **changes: object) -> list[LayerParts]:
    """Layers with random weights."""
    turning, rows = shape.heads + shape.kv_heads, shape.heads + 2 * shape.kv_heads
    d, hd, made = shape.dim, shape.head_dim, torch.Generator().manual_seed(3)
    draw = lambda *size: torch.randn(*size, generator=made) * size[-1] ** -0.5  # noqa: E731
    gains = [1 + draw(d) for _ in range(2)]
    norms = 1 + draw(turning, hd), draw(turning, hd)
    given = {"qkv_bias": draw(rows * hd), "head_norms": norms, **changes}
    layers = range(count)
    return [
        LayerParts(draw(rows * hd, d), draw(d, shape.heads * hd), draw(2 * ffn, d), draw(d, ffn), *gains, **given)  # type: ignore[arg-type]
        for _ in layers
    ]


def turns(shape: Shape) -> Tensor:
    angle = torch.randn(LENGTH, shape.head_dim // 2, generator=torch.Generator().manual_seed(4))
    return torch.stack([angle.cos(), angle.sin()], -1)


def places(shape: Shape, copies: int = 2, **given: object) -> Places:
    return Places(BATCH * copies, copies, SLOTS, 3, turns(shape), **given)  # type: ignore[arg-type]


def shape_of(name: str, **given: object) -> tuple[Shape, int]:
    *sizes, ffn = SHAPES[name]
    return Shape(*sizes, 1e-5, **given), ffn  # type: ignore[arg-type]


def states(count: int, width: int, dim: int) -> Tensor:
    return torch.randn(count, width, dim, generator=torch.Generator().manual_seed(width))


def tree() -> Layout:
    """A root with two children, of which the second has one: other trees for other images."""
    sees = torch.eye(4, dtype=torch.bool).repeat(BATCH, 1, 1)
    sees[:, :, 0] = True
    sees[0, 3, 2] = sees[1, 3, 1] = True
    return Layout(torch.arange(4)[None], torch.tensor([[0, 1, 1, 2]]), sees)


def passes(run: Callable[..., tuple[Tensor, Tensor | None]], dim: int) -> list[Tensor]:
    """Chains of several widths, ragged, and a tree."""
    out = []
    start = torch.tensor([0, 0])
    for width, ahead in ((1, torch.tensor([1, 1])), (5, torch.tensor([2, 5])), (3, torch.tensor([1, 3]))):
        x = states(2 * BATCH, width, dim)
        out.append(run(Inputs(x), width, start, int(start.max()))[0])
        start = start + ahead
    out.append(run(Inputs(states(2 * BATCH, 4, dim)), 4, start, int(start.max()), tree())[0])
    return out


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_our_kernels_give_what_torch_gives(name: str, dtype: torch.dtype, halves: bool) -> None:
    shape, ffn = shape_of(name)
    weights = parts(shape, ffn, halves=halves)
    forms = [form(weights, shape, dtype, torch.ones(shape.dim)) for form in (TorchDecoder, OwnDecoder)]
    caches = [form.cache(places(shape)) for form in forms]
    theirs, ours = (passes(lambda i, *a, c=cache: c.run(Inputs(i.x.to(dtype)), *a), shape.dim) for cache in caches)
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(b.float(), a.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("halves", [False, True])
def test_the_layers_as_a_compiler_is_given_them(halves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without complex numbers, which torch's compiler leaves to others. (Compiling itself takes half a minute.)"""
    shape, ffn = shape_of("plain")
    weights = parts(shape, ffn, halves=halves)
    plain, other = TorchDecoder(weights, shape, torch.float32), TorchDecoder(weights, shape, torch.float32)
    other.compiled = True
    monkeypatch.setattr(decoder, "_compiled", lambda: decoder._layers)
    for a, b in zip(*(passes(form.cache(places(shape)).run, shape.dim) for form in (plain, other)), strict=True):
        torch.testing.assert_close(b, a, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("absent", ["gain_1", "qkv_bias", "head_norms"])
def test_what_a_layer_may_lack(absent: str) -> None:
    shape, ffn = shape_of("plain")
    weights = [dataclasses.replace(layer, **{absent: None}) for layer in parts(shape, ffn)]
    caches = [form(weights, shape, torch.float32).cache(places(shape)) for form in (TorchDecoder, OwnDecoder)]
    for a, b in zip(*(passes(cache.run, shape.dim) for cache in caches), strict=True):
        torch.testing.assert_close(b, a, atol=2e-5, rtol=2e-5)


def test_conditions_tokens_masks_and_shifts() -> None:
    shape, ffn = shape_of("plain")
    open_ = torch.ones(BATCH, SLOTS, dtype=torch.bool)
    open_[0, :2] = open_[1, :3] = False
    table, condition = states(1, 7, shape.dim)[0], states(1, 2 * BATCH, shape.dim)[0]
    found = []
    for form in (TorchDecoder, OwnDecoder):
        shift = torch.tensor([2, 1])
        cache = form(parts(shape, ffn), shape, torch.float32).cache(places(shape, shift=shift, open=open_.clone()))
        sight = torch.ones(3, 3, dtype=torch.bool).tril().expand(BATCH, -1, -1)
        before = cache.run(Inputs(states(2 * BATCH, 3, shape.dim)), 3, torch.tensor([-3, -3]), seen=sight)[0]
        given = Inputs(tokens=torch.tensor([[1, 2, 6], [0, 5, 3]]), table=table, condition=condition)
        found.append([before, cache.run(given, 3, torch.tensor([0, 4]), 4)[0]])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_a_pass_of_any_width_and_batch(dtype: torch.dtype) -> None:
    shape, ffn = shape_of("plain")
    decoder, x = OwnDecoder(parts(shape, ffn), shape, dtype), states(6, 12, shape.dim).to(dtype)

    def draw(rows: list[int], widths: list[int]) -> Tensor:
        cache = decoder.cache(Places(len(rows), 1, SLOTS, 0, turns(shape)))
        out, start = [], 0
        for width in widths:
            at = torch.full((len(rows),), start)
            out.append(cache.run(Inputs(x[rows, start : start + width]), width, at, start)[0])
            start += width
        return torch.cat(out, 1)

    alone = draw([0], [1] * 12)
    for rows, widths in (([0], [12]), ([0, 1, 2, 3, 4, 5], [5, 7]), ([3, 0, 2], [1, 9, 2]), ([5, 0], [3, 3, 3, 3])):
        assert torch.equal(draw(rows, widths)[rows.index(0)], alone[0])


@pytest.mark.parametrize("form", [TorchDecoder, OwnDecoder])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_accepted_path_goes_on_as_a_chain_does(
    form: type[TorchDecoder] | type[OwnDecoder], dtype: torch.dtype
) -> None:
    shape, ffn = shape_of("odd head")
    decoder, x = form(parts(shape, ffn), shape, dtype), states(2 * BATCH, 4, shape.dim).to(dtype)
    start, path = torch.tensor([5, 2]), torch.tensor([[0, 2, 3], [0, 1, 3]])
    walked, plain = (decoder.cache(places(shape)) for _ in range(2))
    walked.run(Inputs(x), 4, start, 5, tree())
    walked.compact(path, start)
    row = torch.arange(2 * BATCH)[:, None]
    plain.run(Inputs(x[row, path.repeat(2, 1)]), 3, start, 5)
    last = states(2 * BATCH, 1, shape.dim).to(dtype)
    a, b = (cache.run(Inputs(last), 1, start + 3, 8)[0] for cache in (walked, plain))
    torch.testing.assert_close(a, b, atol=TOLERANCE[dtype] / 10, rtol=1e-2)


@pytest.mark.parametrize("form", [TorchDecoder, OwnDecoder])
def test_sequences_leave_and_others_take_their_place(form: type[TorchDecoder] | type[OwnDecoder]) -> None:
    shape, ffn = shape_of("plain")
    decoder, x = form(parts(shape, ffn), shape, torch.float32), states(2 * BATCH, 5, shape.dim)
    caches = [decoder.cache(places(shape)) for _ in range(2)]
    outs = [cache.run(Inputs(x), 5, torch.tensor([0, 0]), 0)[0] for cache in caches]
    assert torch.equal(*outs)
    caches[0].keep(torch.tensor([1]))
    last = states(2 * BATCH, 1, shape.dim)
    want = caches[1].run(Inputs(last), 1, torch.tensor([5, 5]), 5)[0]
    torch.testing.assert_close(caches[0].run(Inputs(last[[1, 3]]), 1, torch.tensor([5]), 5)[0], want[[1, 3]])
    fresh = decoder.cache(places(shape))
    fresh.take(caches[0], torch.tensor([0]))
    torch.testing.assert_close(
        fresh.run(Inputs(last[[1, 1, 3, 3]]), 1, torch.tensor([5, 0]), 5)[0][[0, 2]], want[[1, 3]]
    )


def test_the_probed_layer_tells_the_entropy_of_its_attention() -> None:
    shape, ffn = shape_of("shared heads", probed=1)
    found = []
    for form in (TorchDecoder, OwnDecoder):
        cache = form(parts(shape, ffn), shape, torch.float32).cache(places(shape))
        found.append(cache.run(Inputs(states(2 * BATCH, 9, shape.dim)), 9, torch.tensor([0, 3]), 3)[1])
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 19])
def test_a_linear_map(rows: int, dtype: torch.dtype, gated: bool) -> None:
    weight, bias = states(1, 90, 34)[0].to(dtype), None if gated else states(1, 1, 90)[0, 0].to(dtype)
    x = states(1, rows, 34)[0].to(dtype)
    y = LinearMap(weight, bias, dtype, gated).exact(x)
    want = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    if gated:
        want = torch.nn.functional.silu(want[:, :45]) * want[:, 45:]
    torch.testing.assert_close(y.double(), want, atol=TOLERANCE[dtype] / 2, rtol=TOLERANCE[dtype] / 2)
    if not gated:
        assert torch.equal(LinearMap(weight, bias, dtype).rows(), weight)
