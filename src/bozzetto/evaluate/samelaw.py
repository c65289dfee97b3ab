"""Do two samplers draw from the same law? Permutation tests on paired, independent samples.

Image i of A and image i of B have the same class and independent noise. If the laws are equal, the two may be swapped
in any pair without changing the joint law, so a statistic is compared with its values under random swaps: exact at any
sample size, whatever the features (randomisation test; Fisher). Every statistic here has the form

    T = sum_ij h_ij,    h_ij = <f(a_i) - f(b_i), f(a_j) - f(b_j)>

for some feature map f, and swapping pair i flips the sign of f(a_i) - f(b_i). So a permutation is a vector of signs s
and its value s^T H s. With a Gaussian kernel T is the squared MMD (Gretton et al., JMLR 2012) up to its diagonal, with
weighted one-hot tokens it is a two-sample chi-square.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

PERMUTATIONS = 4999
LEVEL = 0.01
_GROUPS = 24
_CHUNK = 1 << 16
_PROJECTIONS = 64

SwapTest = dict[str, Any]  # see `swap_test`


def swap_test(name: str, h: Tensor, permutations: int = PERMUTATIONS, seed: int = 0) -> SwapTest:
    """h: float64 [n, n], symmetric; its diagonal is the same under all swaps and is left out. Returns {name: what is
    compared; statistic: in units of its spread under swaps; p_value: share of swaps that reach it}."""
    h = h.double() - torch.diag(h.double().diagonal())
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (permutations, len(h)), generator=generator).double() * 2 - 1
    swapped = ((signs @ h) * signs).sum(1)
    observed = h.sum()
    # A tie counts against rejection; rounding must not decide it.
    reach = (swapped >= observed - 1e-9 * h.abs().sum()).sum()
    spread = swapped.std().clamp_min(1e-300)
    statistic = float((observed - swapped.mean()) / spread) if h.abs().sum() else 0.0
    return {"name": name, "statistic": statistic, "p_value": (1 + int(reach)) / (1 + permutations)}


def kernel_differences(a: Tensor, b: Tensor) -> Tensor:
    """H of a Gaussian kernel whose width is the median distance: features [n, d] of A and B -> float64 [n, n]."""
    a, b = a.double(), b.double()
    both = torch.cat([a, b])
    squared = torch.cdist(both, both).square()
    width = squared[squared > 0].median() if bool((squared > 0).any()) else torch.ones(()).double()
    k = torch.exp(-squared / width)
    n = len(a)
    return k[:n, :n] + k[n:, n:] - k[:n, n:] - k[n:, :n]


def code_differences(a: Tensor, b: Tensor) -> Tensor:
    """H of weighted counts: codes int64 [n, m] of A and B, each image a bag of m codes -> float64 [n, n].

    A code weighs one over its pooled count (which no swap changes), as in the chi-square statistic.
    """
    n = len(a)
    kinds, code = torch.unique(torch.cat([a, b]), return_inverse=True)
    pooled = torch.bincount(code.flatten(), minlength=len(kinds)).double()
    seen = (pooled > 1).nonzero().squeeze(1)  # a code that occurs once says nothing about pairs of images
    column = torch.full_like(pooled, -1, dtype=torch.int64)
    column[seen] = torch.arange(len(seen))
    code, weight = column[code], pooled[seen].rsqrt()
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(n)
    row = torch.arange(n).repeat(2)[:, None].expand_as(code)
    h = torch.zeros(n, n, dtype=torch.float64)
    for first in range(0, len(seen), _CHUNK):  # a dense block of columns at a time
        size = min(_CHUNK, len(seen) - first)
        inside = (code >= first) & (code < first + size)
        at = row[inside] * size + code[inside] - first
        # Whole numbers up to here: equal bags of codes cancel to exactly zero.
        counts = torch.zeros(n * size, dtype=torch.float64).index_add_(0, at, sign[:, None].expand_as(code)[inside])
        block = counts.view(n, size) * weight[first : first + size]
        h += block @ block.T
    return h


def by_position(tokens: Tensor, vocab: int) -> Tensor:
    """Codes of per-position histograms: tokens int64 [n, N] -> codes int64 [n, N]."""
    return tokens + vocab * torch.arange(tokens.shape[1])


def neighbour_pairs(groups: Tensor, side: int) -> Tensor:
    """Codes of right-hand and lower neighbours, pooled over positions: groups int64 [n, side * side] -> [n, m]."""
    grid = groups.view(-1, side, side)
    base = int(groups.max()) + 1
    right = grid[:, :, :-1] * base + grid[:, :, 1:]
    below = grid[:, :-1] * base + grid[:, 1:] + base * base
    return torch.cat([right.flatten(1), below.flatten(1)], 1)


def frequency_groups(a: Tensor, b: Tensor, vocab: int, groups: int = _GROUPS) -> tuple[Tensor, Tensor]:
    """Tokens replaced by groups of equal pooled frequency, common tokens apart: pairs of groups fill their table."""
    pooled = torch.bincount(torch.cat([a, b]).flatten(), minlength=vocab)
    order = pooled.argsort(descending=True, stable=True)
    before = pooled[order].cumsum(0) - pooled[order]
    group = torch.empty(vocab, dtype=torch.int64)
    group[order] = before * min(groups, vocab) // max(1, int(pooled.sum()))
    return group[a], group[b]


def _side(tokens: Tensor) -> int:
    """Of the square that tokens [n, N, ...] make; 0 where they make none."""
    side = math.isqrt(tokens.shape[1])
    return side * (side**2 == tokens.shape[1])


def token_tests(a: Tensor, b: Tensor, vocab: int, permutations: int = PERMUTATIONS) -> list[SwapTest]:
    """Tests on tokens int64 [n, N] of A and B: by position, counts over the image, neighbouring pairs."""
    found = [
        swap_test("tokens by position", code_differences(by_position(a, vocab), by_position(b, vocab)), permutations),
        swap_test("token counts", code_differences(a, b), permutations),
    ]
    if side := _side(a):
        pairs = [neighbour_pairs(g, side) for g in frequency_groups(a, b, vocab)]
        found.append(swap_test("neighbouring pairs", code_differences(*pairs), permutations))
    return found


def linear_differences(a: Tensor, b: Tensor) -> Tensor:
    """H of plain features, each scaled to pooled deviation 1: [n, ...] of A and B -> float64 [n, n]."""
    a, b = a.double().flatten(1), b.double().flatten(1)
    difference = (a - b) / torch.cat([a, b]).std(0).clamp_min(1e-12)
    return difference @ difference.T


def _waves(values: Tensor, seed: int) -> Tensor:
    """Means over places of cosines and sines of random projections: [n, m, d] -> float64 [n, 6 P]. Together they fix
    the law of a value (its characteristic function); the frequencies suit values of deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(values.shape[-1], _PROJECTIONS, generator=generator)
    directions = (directions / directions.norm(dim=0)).double()
    along = values.double() @ directions
    waves = [f(scale * along).mean(1) for scale in (0.7, 1.5, 3.0) for f in (torch.cos, torch.sin)]
    return torch.cat(waves, 1)


def vector_tests(a: Tensor, b: Tensor, permutations: int = PERMUTATIONS) -> list[SwapTest]:
    """Tests on continuous tokens float [n, N, D] of A and B: their mean and spread by position, the law of a token over
    the image, and that of neighbouring pairs."""
    found = [
        swap_test("tokens by position", linear_differences(a, b), permutations),
        swap_test("squares by position", linear_differences(a.square(), b.square()), permutations),
        swap_test("token values", linear_differences(_waves(a, 0), _waves(b, 0)), permutations),
    ]
    if side := _side(a):
        pairs = [_vector_pairs(x, side) for x in (a, b)]
        found.append(swap_test("neighbouring pairs", linear_differences(*(_waves(p, 1) for p in pairs)), permutations))
    return found


def _vector_pairs(tokens: Tensor, side: int) -> Tensor:
    """A token beside its right-hand, and above its lower neighbour: [n, N, D] -> [n, m, 2 D]."""
    grid = tokens.unflatten(1, (side, side))
    right = torch.cat([grid[:, :, :-1], grid[:, :, 1:]], -1)
    below = torch.cat([grid[:, :-1], grid[:, 1:]], -1)
    return torch.cat([right.flatten(1, 2), below.flatten(1, 2)], 1)


def surprisal_test(a: Tensor, b: Tensor, permutations: int = PERMUTATIONS) -> SwapTest:
    """Mean surprisal of A and B: float64 [n, N] nats each, of every token under the target's own law, +inf outside
    its support. The sharpest test against a wrong temperature or a support that leaks."""
    limit = 50.0
    difference = a.double().clamp_max(limit).mean(1) - b.double().clamp_max(limit).mean(1)
    return swap_test("surprisal", difference[:, None] * difference[None], permutations)


def rejected(tests: list[SwapTest], level: float = LEVEL) -> bool:
    """Whether the laws differ at this level over all tests together (Bonferroni)."""
    return any(test["p_value"] < level / len(tests) for test in tests)
