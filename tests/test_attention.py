"""Attention of eager passes: one query asked for twice is the same query."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bozzetto.runtime.attention import attend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 3])
def test_attention_is_that_of_torch_for_any_number_of_queries(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(4, 3, width, 8, generator=generator).to(dtype)
    keys, values = (torch.randn(4, 3, 20, 8, generator=generator).to(dtype) for _ in range(2))
    mask = torch.zeros(4, 1, width, 20, dtype=dtype).masked_fill(
        torch.rand(4, 1, width, 20, generator=generator) < 0.4, -torch.inf
    )
    mask[..., 0] = 0
    wanted = F.scaled_dot_product_attention(q.double(), keys.double(), values.double(), attn_mask=mask.double())
    found = attend(q, keys, values, mask)
    assert found.shape == q.shape and found.dtype == dtype
    close = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), wanted, atol=close, rtol=close)
    shared = attend(q[:2], keys[:2], values[:2], mask[:1])  # a mask for all rows
    assert shared.shape == q[:2].shape
