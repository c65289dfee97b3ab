"""Which codes lie close to a code: the table that relaxed rules borrow probability by.

Built on the codebook's own device in chunks; only the first k <= 1024 columns are kept, as int32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bozzetto.errors import require

MOST = 1024


def nearest_codes(codebook: Tensor, k: int, chunk: int = 1024) -> Tensor:
    """Indices int32 [V, k] of the k nearest other codes of each row, nearest first; ties by the smaller index.

    codebook: float [V, d], of which the unit vectors are compared, as a tokenizer with normalised codes sees them.
    Raises UsageError for a k that is not in 1..min(V - 1, 1024).
    """
    most = min(len(codebook) - 1, MOST)
    require(1 <= k <= most, "k", k, f"a whole number from 1 to {most} (the codebook has {len(codebook)})")
    codes = F.normalize(codebook.float(), dim=-1)
    square = codes.square().sum(-1)
    parts = []
    for first in range(0, len(codes), chunk):
        rows = codes[first : first + chunk]
        closeness = 2 * rows @ codes.t() - square  # minus the squared distance, up to a constant of the row
        own = torch.arange(first, first + len(rows), device=codes.device)[:, None]
        closeness.scatter_(1, own, -torch.inf)
        found, order = closeness.topk(k, -1)
        # topk leaves open which of equal values it takes, and in which order: by index here.
        torn = (closeness >= found[:, -1:]).sum(1) > k
        order[torn] = closeness[torn].sort(dim=1, descending=True, stable=True).indices[:, :k]
        order = order.sort(1).values
        ranked = closeness.gather(1, order).argsort(dim=1, descending=True, stable=True)
        parts.append(order.gather(1, ranked).int())
    return torch.cat(parts)
