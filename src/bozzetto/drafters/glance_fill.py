"""A glance (drafters/glance.py) as a part of a step: from what a pass has just found to the laws of the next drafts.

`GlanceSketcher` is the readable twin. Here nothing is held: what is kept of features is a tensor of the slots, what is
kept of tokens a table of the codebook, so that all of it can be compiled into the pass (decoding/advance.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.drafters.glance import GlanceNet, known_around
from bozzetto.runtime.linear import TorchMap, fixed_map


class GlanceFill(nn.Module):
    """embedding, head: the target's rows [V, d], in the dtype to compute in; fresh: drafts at the head of the window
    that are drawn anew in every pass; output: a compiled target's map of `head`, whose weights are at hand then. With
    it, runtime/linear.py may choose our kernel for the others too."""

    @torch.no_grad()
    def __init__(
        self, net: GlanceNet, embedding: Tensor, head: Tensor, fresh: int = 0, output: nn.Module | None = None
    ):
        super().__init__()
        self.config, self.fresh, dtype = net.config, fresh, head.dtype

        def linear(weight: Tensor, gated: bool = False) -> Any:
            weight = weight.detach().to(dtype).contiguous()
            return TorchMap(weight, None, gated) if output is None else fixed_map(weight, dtype, gated=gated)

        def fixed(weight: Tensor) -> nn.Parameter:
            return nn.Parameter(weight.detach().to(dtype).contiguous(), requires_grad=False)

        self.of_token = fixed(F.linear(embedding, net.of_token.weight.to(dtype)))  # [V, narrow]
        self.of_feature, self.last, self.around = map(
            linear, (w.weight for w in (net.of_feature, net.last, net.around))
        )
        self.gate_up, self.down = linear(net.gate_up.weight, gated=True), linear(net.down.weight)
        self.output, self.to_logits = output or linear(head), linear(net.to_logits.weight)
        self.gain, self.shift, self.column, self.norm = map(fixed, (net.gain, net.shift, net.column, net.norm.weight))
        self.before = fixed(net.before.weight)

    def extra_repr(self) -> str:
        return f"{self.config}, fresh={self.fresh}"

    @property
    def narrow(self) -> int:
        """Numbers that are kept of a feature."""
        return self.config.narrow

    def forward(
        self, hidden: Tensor, kept: Tensor, tokens: Tensor, count: Tensor, committed: Tensor, most: int
    ) -> Tensor:
        """hidden [R, W, d] of a pass from token `count` int64 [B] on, R = copies B; kept [B, copies, S, narrow] is
        changed in place; tokens: int64 [B, S], what is committed, `committed` int64 [B] by this pass; most: drafts
        wanted -> logits float32 [R, min(most, K), V] of the tokens behind, without what the table adds."""
        c, (batch, copies, *_), width = self.config, kept.shape, hidden.shape[1]
        row, copy = (torch.arange(n, device=hidden.device) for n in (batch, copies))
        new = count[:, None] + torch.arange(width, device=hidden.device)
        kept[row[:, None, None], copy[:, None], new[:, None]] = _by_image(self.of_feature(hidden), copies)
        last = (count + committed - 1).clamp_min(0)[:, None]  # [B, 1]; a slot without an image commits nothing
        number = last + 1 + torch.arange(min(most, c.places), device=hidden.device)  # [B, K]
        far_tokens, far_features = c.around
        where, known = known_around(number, far_tokens, last)
        around = torch.where(known, self.of_token[tokens[row[:, None, None], where]], 0).flatten(2)
        ends = self.of_token[tokens.gather(1, last)].expand(-1, number.shape[1], -1)
        where, known = known_around(number, far_features, last)
        of_features = kept[row[:, None, None, None], copy[:, None, None], where[:, None]]
        of_features = torch.where(known[:, None], of_features, 0).flatten(3)  # [B, copies, K, .]
        ours = torch.cat([ends, around], -1).repeat(copies, 1, 1)
        seen = torch.cat([ours, of_features.transpose(0, 1).flatten(0, 1)], -1)
        at = (committed - 1).clamp_min(0).repeat(copies)[:, None, None].expand(-1, -1, c.dim)
        places = number.shape[1]
        column = self.column[number % c.grid].repeat(copies, 1, 1)
        h = self.last(hidden.gather(1, at)) * self.gain[:places] + self.shift[:places] + column + self.around(seen)
        h = self.down(self.gate_up(F.rms_norm(h, (c.dim,), self.norm, 1e-6)), h)
        return self.output(h).float()

    def bias(self, tokens: Tensor) -> Tensor:
        """What the table adds to logits behind tokens int64 [B, n]: float32 [B, n, V]."""
        return self.to_logits(self.before[tokens]).float()


def _by_image(part: Tensor, copies: int) -> Tensor:
    """[copies B, ...] -> [B, copies, ...]."""
    return part.unflatten(0, (copies, -1)).transpose(0, 1)
