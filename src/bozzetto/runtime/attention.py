"""Attention of eager passes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention: q [R, H, n, hd]; keys, values [R, H, S, hd]; additive mask [R or 1, 1, n, S] -> [R, H, n, hd].

    One query in bfloat16 on a CPU is asked for twice: torch's products of a single row take a slow path (on processors
    without a matrix unit several times the time of two rows), which would be a good part of a sequential pass.
    """
    if q.shape[2] == 1 and q.dtype == torch.bfloat16 and q.device.type == "cpu":
        twice = q.expand(-1, -1, 2, -1)
        return F.scaled_dot_product_attention(twice, keys, values, attn_mask=mask.expand(-1, -1, 2, -1))[:, :, :1]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
