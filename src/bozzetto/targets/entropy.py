"""How spread out attention is: the uncertainty that Drift-AR (arXiv 2603.28049) reads off a causal model."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention_entropy(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """Entropy of the attention map with heads averaged, over its largest value (eq. 4): float32 [R, W] in [0, 1], 0
    where there is one key. q [R, H, W, hd]; k [R, H, S, hd]; seen bool, broadcastable to [R, W, S]."""
    scores = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
    seen = seen.expand(len(q), q.shape[2], k.shape[2])
    shares = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1).mean(1)  # [R, W, S]
    found = -torch.xlogy(shares, shares).sum(-1)
    return found / seen.sum(-1).clamp_min(2).log()
