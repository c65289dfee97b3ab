"""The table of nearest codes is what a double loop finds, whatever the chunks; what a candidate borrows from them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bozzetto.errors import UsageError
from bozzetto.rules.lantern import Lantern, LanternPlusPlus
from bozzetto.rules.neighbours import nearest_codes

CODES = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))


def slow(codes: Tensor, k: int) -> list[list[int]]:
    rows = []
    for i in range(len(codes)):
        far = [(float((codes[i] - codes[j]).square().sum()), j) for j in range(len(codes)) if j != i]
        rows.append([j for _, j in sorted(far)[:k]])
    return rows


@pytest.mark.parametrize("chunk", [1, 7, 1024])
@pytest.mark.parametrize("k", [1, 10, 49])
def test_the_table_is_what_a_double_loop_finds(k: int, chunk: int) -> None:
    unit = torch.nn.functional.normalize(CODES.double(), dim=-1)
    table = nearest_codes(CODES, k, chunk=chunk)
    assert table.dtype == torch.int32
    assert table.tolist() == slow(unit, k)


def test_norms_do_not_matter() -> None:
    stretched = CODES * torch.linspace(0.2, 3, 50)[:, None]
    assert torch.equal(nearest_codes(stretched, 10), nearest_codes(CODES, 10))
    assert nearest_codes(stretched, 10).tolist() != slow(stretched.double(), 10)


def test_no_code_is_its_own_neighbour_and_equal_distances_go_by_index() -> None:
    for codes, k in ((6, 5), (64, 3), (64, 20)):
        table = nearest_codes(torch.eye(codes), k)
        assert table.tolist() == [[j for j in range(codes) if j != i][:k] for i in range(codes)]


@pytest.mark.parametrize("chunk", [7, 1024])
def test_copies_of_a_code_come_first_and_by_index(chunk: int) -> None:
    corners = torch.tensor([[1.0, 0], [0, 1], [-1, 0]]).repeat(20, 1)
    table = nearest_codes(corners, 10, chunk=chunk)
    assert table.tolist() == [[j for j in range(i % 3, 60, 3) if j != i][:10] for i in range(60)]


@pytest.mark.parametrize(("codes", "k", "most"), [(50, 0, 49), (50, 50, 49), (50, -1, 49), (1100, 1025, 1024)])
def test_a_k_that_the_codebook_does_not_hold_is_refused(codes: int, k: int, most: int) -> None:
    with pytest.raises(UsageError, match=rf"k = {k} is not allowed: a whole number from 1 to {most}"):
        nearest_codes(torch.randn(codes, 2), k)


def test_candidates_borrow_a_leading_run_within_their_budget_and_improbable_neighbours_are_free() -> None:
    random = torch.Generator().manual_seed(0)
    codes = nearest_codes(torch.randn(64, 4, generator=random), 40)
    p = (2 * torch.randn(64, 64, generator=random)).softmax(-1)
    p[:, ::2] = 0
    p = p / p.sum(-1, keepdim=True)
    x, limitless = torch.arange(64), torch.full((64,), torch.inf)
    own = p.gather(1, x[:, None])[:, 0]
    for delta in (0.0, 0.1, 0.4):
        mass, near, inside = Lantern(40, delta).borrowed(p, x, codes, limitless)
        assert float(mass.max()) <= delta
        assert torch.equal(near, codes.long())
        assert torch.allclose(mass, (p.gather(1, near) * inside).sum(1), atol=1e-6)
        assert torch.equal(inside.long().cummin(1).values, inside.long())
        further = p.gather(1, near).cumsum(1)[~inside]
        assert bool((further > delta).all())
        free = p.gather(1, near).cumsum(1) == 0
        assert bool(inside[free].all())
        tight = Lantern(40, delta).borrowed(p, x, codes, torch.full((64,), 0.03))[0]
        assert float(tight.max()) <= 0.03
    for factor in (1.0, 2.0, 5.0):
        mass = LanternPlusPlus(k=40, lam=factor).borrowed(p, x, codes, limitless)[0]
        assert bool((own + mass <= factor * own + 1e-6).all())
