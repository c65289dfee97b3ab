"""The table of nearest codes: what a double loop finds, whatever the chunks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bozzetto.errors import UsageError
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


def test_raw_distances_see_the_norms() -> None:
    stretched = CODES * torch.linspace(0.2, 3, 50)[:, None]
    assert nearest_codes(stretched, 10, raw=True).tolist() == slow(stretched.double(), 10)
    assert torch.equal(nearest_codes(stretched, 10), nearest_codes(CODES, 10))
    assert not torch.equal(nearest_codes(stretched, 10), nearest_codes(stretched, 10, raw=True))


def test_no_code_is_its_own_neighbour_and_equal_distances_go_by_index() -> None:
    table = nearest_codes(torch.eye(6), 5)
    assert table.tolist() == [[j for j in range(6) if j != i] for i in range(6)]


@pytest.mark.parametrize(("codes", "k", "most"), [(50, 0, 49), (50, 50, 49), (50, -1, 49), (1100, 1025, 1024)])
def test_a_k_that_the_codebook_does_not_hold_is_refused(codes: int, k: int, most: int) -> None:
    with pytest.raises(UsageError, match=rf"k = {k} is not allowed: a whole number from 1 to {most}"):
        nearest_codes(torch.randn(codes, 2), k)
