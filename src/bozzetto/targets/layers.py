"""What the networks of targets and of drafters are put together from: norms, rotations, masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.drafts import Layout
from bozzetto.errors import UsageError


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, times a learned gain."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype) * self.weight.to(x.dtype)


def small_weights(net: nn.Module) -> None:
    """Where a network's training begins: weights of deviation 0.02, biases of zero."""
    for name, weight in net.named_parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(weight)


def small_maps(net: nn.Module) -> None:
    """The same of its linear maps and embeddings only, biases as they are."""
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)


class OnGrid:
    """What configs of transformers over a grid of tokens share."""

    dim: Any
    heads: Any
    grid: Any

    @property
    def head_dim(self) -> int:
        return int(self.dim // self.heads)

    @property
    def length(self) -> int:
        """Tokens per image, N."""
        return int(self.grid * self.grid)


class Rotating(nn.Module):
    """A network with a table of rotations [N, hd/2, 2], which is made by a function and not stored."""

    rope: Tensor

    def turn_by(self, turns: Callable[[], Tensor]) -> None:
        self.turns = turns
        self.register_buffer("rope", turns(), persistent=False)


def check_heads(dim: int, heads: int) -> None:
    """Raise UsageError where heads do not divide dim into fours: two directions, each turned in pairs."""
    if heads < 1 or dim < 1 or dim % (4 * heads):
        raise UsageError(f"dim = {dim} with heads = {heads} is not allowed: dim must be a multiple of 4 heads")


def rope_table(grid: int, head_dim: int, base: float = 10000.0, lead: int = 0) -> Tensor:
    """Rotations [lead + grid^2, head_dim / 2, 2] as (cos, sin); the first `lead` rows are zero (condition tokens).

    The first half of the frequencies turns with the row, the second with the column.
    """
    half = head_dim // 2
    frequency = 1.0 / base ** (torch.arange(0, half, 2)[: half // 2].float() / half)
    angle = torch.outer(torch.arange(grid).float(), frequency)  # [grid, head_dim/4]
    by_row = angle[:, None].expand(grid, grid, -1)
    by_column = angle[None, :].expand(grid, grid, -1)
    angles = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)  # [grid^2, head_dim/2]
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([torch.zeros(lead, *table.shape[1:]), table])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate interleaved pairs. x [..., H, hd]; rotation broadcastable [..., 1, hd/2, 2]. Computed in float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


def rotate_pairs(x: Tensor, rotation: Tensor) -> Tensor:
    """`rotate` as one complex product. x [..., hd]; rotation complex64, broadcastable to [..., hd/2]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def visible(columns: Tensor, start: Tensor, width: int, layout: Layout | None) -> Tensor:
    """Which cache slots each input of a pass attends to: bool [B, W, S] for columns int64 [S], start int64 [B]."""
    after = columns - start[:, None]  # [B, S], slots counted from the start
    if layout is None:
        return after[:, None] <= torch.arange(width, device=columns.device)[:, None]
    reach = layout.sees.shape[-1]
    index = after.clamp(0, reach - 1)[:, None].expand(-1, width, -1)
    inside = layout.sees.expand(len(start), -1, -1).gather(2, index)
    return (after < 0)[:, None] | (inside & (after < reach)[:, None])


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to scores: 0 where attention is allowed, minus infinity elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)


def stacked(one: Tensor, other: Tensor, copies: int, axis: int = 0) -> Tensor:
    """Rows of two batches, each with its `copies` one after another along an axis -> those of one batch."""
    pairs = zip(one.chunk(copies, axis), other.chunk(copies, axis), strict=True)
    return torch.cat([part for pair in pairs for part in pair], axis)


def copied(part: Tensor, copies: int) -> Tensor:
    """The batch `copies` times, one after another."""
    return part.repeat(copies, *[1] * (part.ndim - 1))


def whole_blocks(columns: int, most: int) -> int:
    """Columns rounded up to whole blocks of 64: few distinct shapes, at most `most`."""
    return min(most, -(-columns // 64) * 64)


def attention_entropy(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """Entropy of the attention map with heads averaged, over its largest value (Drift-AR, arXiv 2603.28049, eq. 4):
    float32 [R, W] in [0, 1], 0 where there is one key. q [R, H, W, hd]; k [R, H, S, hd]; seen bool, broadcastable to
    [R, W, S]."""
    scores = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
    seen = seen.expand(len(q), q.shape[2], k.shape[2])
    shares = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1).mean(1)  # [R, W, S]
    found = -torch.xlogy(shares, shares).sum(-1)
    return found / seen.sum(-1).clamp_min(2).log()
