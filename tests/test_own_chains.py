"""Chains of denoising heads by our kernels, against torch's: whole, coupled, in any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bozzetto.targets.heads import FlowLaw, PackedDenoiser
from test_heads import CONDITION, KINDS, NETS, D, Law, normal, schedule_of, times_of

NEAR = {torch.float32: 2e-5, torch.bfloat16: 0.05}
DTYPES = [torch.float32, torch.bfloat16]
STEPS = 6


def laws(kind: type[Law], guidance: float, dtype: torch.dtype, batch: int, width: int = 3) -> tuple[Any, Any]:
    """A law of torch's and the same of our kernels."""
    made = []
    for own in (False, True):
        head = PackedDenoiser(NETS[kind], times_of(kind), dtype, own)
        condition = normal(1, 3, width, CONDITION)[:batch].flatten(0, 1)
        condition = condition if guidance == 1 else torch.cat([condition, normal(2, *condition.shape)])
        made.append(kind(schedule_of(kind), head, condition, (batch, width), guidance, 0.9))
    return made[0], made[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "guidance"), [(1, 1.0), (1, 2.0), (3, 2.0)])
def test_whole_chains_are_torchs(kind: type[Law], dtype: torch.dtype, batch: int, guidance: float) -> None:
    plain, own = laws(kind, guidance, dtype, batch)
    noise = normal(5, batch * 3, STEPS + 1, D)
    wanted, found = plain.run(noise), own.run(noise)
    for name in ("states", "mean", "std"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert (ours - theirs).norm() <= NEAR[dtype] * theirs.norm()
    assert (own.calls, own.rows) == (plain.calls, plain.rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_place_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    noise = normal(5, 9 * 3, STEPS + 1, D)[:9]
    _, many = laws(FlowLaw, 1.0, dtype, 3)
    _, one = laws(FlowLaw, 1.0, dtype, 1)
    assert torch.equal(one.run(noise[:3]).states, many.run(noise).states[:3])
