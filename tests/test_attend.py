"""Our own attention kernel is torch's attention, over the columns that each query sees."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bozzetto.errors import UsageError
from bozzetto.runtime import native
from bozzetto.runtime.native import HEAD_UNIT, in_pairs, load_kernels

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def attend() -> Callable[..., Tensor]:
    load_kernels()
    return torch.ops.bozzetto.attend


@dataclass
class Case:
    """A call: R = copies * batch rows, caches of `slots` columns of which the first `reach` are looked at."""

    q: Tensor
    keys: Tensor
    values: Tensor
    seen: Tensor

    def wanted(self) -> Tensor:
        """By torch, in float32."""
        reach, copies = self.seen.shape[-1], len(self.q) // len(self.seen)
        q, keys, values = self.q.float(), self.keys.float()[:, :, :reach], self.values.float()[:, :, :reach]
        mask = self.seen.repeat(copies, 1, 1)[:, None]
        return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask).transpose(1, 2)

    def call(self, attend: Callable[..., Tensor], steady: bool = False) -> Tensor:
        keys, values = self.keys, self.values
        if self.q.dtype == torch.bfloat16:
            odd = keys.shape[2] % 2
            keys, values = F.pad(keys, (0, 0, 0, odd)), in_pairs(F.pad(values, (0, 0, 0, odd)))
        return attend(self.q, keys, values, self.seen, steady)

    def check(self, attend: Callable[..., Tensor]) -> None:
        found = self.call(attend)
        assert found.shape == self.q.shape and found.dtype == self.q.dtype
        near = 1e-5 if self.q.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found.float(), self.wanted(), atol=near, rtol=0)


def ragged(batch: int, width: int, reach: int, made: torch.Generator) -> Tensor:
    """Plain runs of places that begin anywhere: each query sees what is before it, and itself."""
    start = torch.randint(0, reach - width + 1, (batch, 1, 1), generator=made)
    return torch.arange(reach) <= start + torch.arange(width)[:, None]


def tree_like(batch: int, width: int, reach: int, made: torch.Generator) -> Tensor:
    """A common past, then some of the columns; every query sees at least one."""
    seen = torch.rand(batch, width, reach, generator=made) < 0.3
    seen |= torch.arange(reach) < torch.randint(0, reach // 2 + 1, (batch, 1, 1), generator=made)
    own = torch.randint(reach, (batch, width, 1), generator=made)
    return seen | (torch.arange(reach) == own)


def one_column(batch: int, width: int, reach: int, made: torch.Generator) -> Tensor:
    return torch.arange(reach) == torch.randint(reach, (batch, width, 1), generator=made)


Sight = Callable[[int, int, int, torch.Generator], Tensor]


def case(
    dtype: torch.dtype,
    width: int,
    batch: int = 2,
    copies: int = 1,
    heads: int = 3,
    dim: int = 32,
    reach: int = 37,
    sight: Sight = ragged,
) -> Case:
    made = torch.Generator().manual_seed(width + 31 * dim + reach)
    rows, slots = copies * batch, reach + 6
    q = torch.randn(rows, width, heads, dim, generator=made).to(dtype)
    keys, values = (torch.randn(rows, heads, slots, dim, generator=made).to(dtype) for _ in range(2))
    return Case(q, keys, values, sight(batch, width, reach, made).contiguous())


@pytest.mark.parametrize("sight", [ragged, tree_like, one_column])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 16, 20, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width_and_sight_is_torchs_attention(
    attend: Callable[..., Tensor], dtype: torch.dtype, width: int, sight: Sight
) -> None:
    case(dtype, width, sight=sight).check(attend)


@pytest.mark.parametrize("reach", [20, 31, 32, 33, 64, 101, 257])
@pytest.mark.parametrize(("heads", "dim"), [(1, 32), (3, 64), (1, 96), (2, 128)])
@pytest.mark.parametrize("width", [1, 3, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_reach_and_head_is_torchs_attention(
    attend: Callable[..., Tensor], dtype: torch.dtype, width: int, heads: int, dim: int, reach: int
) -> None:
    case(dtype, width, heads=heads, dim=dim, reach=reach).check(attend)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("width", [1, 4, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_guidance_rows_see_what_their_image_sees(
    attend: Callable[..., Tensor], dtype: torch.dtype, width: int, batch: int
) -> None:
    case(dtype, width, batch=batch, copies=2, sight=tree_like).check(attend)


@pytest.mark.parametrize("width", [1, 4, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_visible_column_gives_its_value(attend: Callable[..., Tensor], dtype: torch.dtype, width: int) -> None:
    given = case(dtype, width, sight=one_column)
    column = given.seen.int().argmax(-1)[:, None, :, None].expand(-1, 3, -1, 32)  # [B, H, W, D]
    wanted = given.values.gather(2, column).transpose(1, 2)
    assert torch.equal(given.call(attend), wanted)


@pytest.mark.parametrize("width", [1, 3, 4, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_that_nobody_sees_do_not_matter(attend: Callable[..., Tensor], dtype: torch.dtype, width: int) -> None:
    given = case(dtype, width, sight=tree_like)
    given.seen[:, :, 5:9] = given.seen[:, :, 30:] = False
    given.seen[:, :, 0] = True
    before = given.call(attend)
    for part in (given.keys, given.values):
        for hidden in (slice(5, 9), slice(30, None)):
            part[:, :, hidden] = 1e4 * torch.randn_like(part[:, :, hidden])
    assert torch.equal(given.call(attend), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_longer_caches_left_behind_does_not_matter(attend: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """A thread keeps its packed columns from call to call."""
    for width in (20, 2):
        large = case(dtype, width, reach=257)
        large.values.fill_(float("inf"))
        large.call(attend)
        case(dtype, width, reach=21).check(attend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(attend: Callable[..., Tensor], dtype: torch.dtype) -> None:
    given = case(dtype, 5)
    given.q *= 64
    found = given.call(attend)
    torch.testing.assert_close(found.float(), given.wanted(), atol=2e-2 if dtype == torch.bfloat16 else 1e-3, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_may_be_a_view_of_a_larger_tensor(attend: Callable[..., Tensor], dtype: torch.dtype) -> None:
    given = case(dtype, 5)
    packed = torch.stack([given.q, -given.q], 2)  # [R, W, 2, H, D], as one product of all three maps gives them
    given.q = packed[:, :, 0]
    assert not given.q.is_contiguous()
    given.check(attend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_steady_results_do_not_depend_on_who_else_is_asked(attend: Callable[..., Tensor], dtype: torch.dtype) -> None:
    given = case(dtype, 21, batch=2, copies=2, reach=101, sight=tree_like)
    together = given.call(attend, steady=True)
    for first, last in ((0, 1), (1, 3), (3, 7), (4, 20), (20, 21)):
        q, seen = given.q[:, first:last], given.seen[:, first:last].contiguous()
        alone = Case(q, given.keys, given.values, seen).call(attend, steady=True)
        assert torch.equal(alone, together[:, first:last])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("width", [1, 4, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_does_not_matter(attend: Callable[..., Tensor], dtype: torch.dtype, width: int) -> None:
    given, found = case(dtype, width, batch=3, copies=2), []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(given.call(attend))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "change",
    [
        {"q": torch.zeros(2, 4, 3, HEAD_UNIT + 8), "keys": torch.zeros(2, 3, 43, HEAD_UNIT + 8)},
        {"seen": torch.ones(2, 4, 44, dtype=torch.bool)},
        {"seen": torch.ones(3, 4, 37, dtype=torch.bool)},
        {"keys": torch.zeros(2, 2, 43, HEAD_UNIT)},
        {"keys": torch.zeros(2, 43, 3, HEAD_UNIT).transpose(1, 2)},
    ],
)
def test_shapes_that_do_not_fit_are_refused(attend: Callable[..., Tensor], change: dict[str, Tensor]) -> None:
    given = {**vars(case(torch.float32, 4)), **change}
    with pytest.raises(RuntimeError, match="attend: "):
        attend(given["q"], given["keys"], given["values"], given["seen"], False)


def test_a_machine_without_a_compiler_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.ops, "bozzetto", object())  # not loaded
    with pytest.raises(UsageError, match=r"needs a C\+\+ compiler.*compile = 'off'"):
        load_kernels(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "a-compiler"
    compiler.write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
    compiler.chmod(0o755)
    with pytest.raises(UsageError, match=r"a-compiler could not build the kernels: no such header"):
        native._build(str(compiler), str(tmp_path / "out.so"))
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(torch.ops, "bozzetto", object())
    with pytest.raises(UsageError, match="a-compiler could not build"):
        load_kernels(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("copies", "width", "heads"), [(1, 1, 2), (2, 3, 4), (1, 17, 1)])
def test_appending_writes_the_columns_of_the_pass_and_nothing_else(
    attend: Callable[..., Tensor], dtype: torch.dtype, copies: int, width: int, heads: int
) -> None:
    """Queries, keys and values are slices of one tensor, as a fused map gives them."""
    made, batch, slots, dim = torch.Generator().manual_seed(width), 3, 40, 32
    rows = copies * batch
    qkv = torch.randn(rows, width, 3, heads, dim, generator=made).to(dtype)
    q, k, v = qkv.unbind(2)
    keys, values = (torch.randn(rows, heads, slots, dim, generator=made).to(dtype) for _ in range(2))
    slot = torch.stack([torch.randperm(slots, generator=made)[:width] for _ in range(batch)])
    seen = (torch.rand(batch, width, slots, generator=made) < 0.5) | (torch.arange(slots) == slot[..., None])
    held = in_pairs(values) if dtype == torch.bfloat16 else values.clone()
    new_keys = keys.clone()
    out = torch.ops.bozzetto.append_attend(q, k, v, new_keys, held, slot, seen, False)
    place = (torch.arange(rows)[:, None, None], torch.arange(heads), slot.repeat(copies, 1)[..., None])
    keys[place], values[place] = k, v
    wanted = in_pairs(values) if dtype == torch.bfloat16 else values
    assert torch.equal(new_keys, keys) and torch.equal(held, wanted)
    assert torch.equal(out, attend(q, keys, wanted, seen, False))
