"""Linear maps of a compiled pass: torch's, or our own kernel (linear.cpp) where that is the faster one.

On a processor without a matrix unit our kernel reads the weights at the speed of the memory for up to about eight
rows, where torch's products in bfloat16 take three times as long.

`torch.ops.bozzetto.linear(x [..., K], weight, columns, gated, bias, more)` gives x W^T + bias + more, [..., columns];
gated: silu(x A^T) * (x B^T) for W = [A; B]; weight: of `laid_out`. A row has the same bits whatever rows stand beside
it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.runtime.native import has_matrix_unit

_LANES, _GROUP = 16, 32  # columns of a register, and of a group in the kernel's layout


def own_linear_pays(weight: Tensor) -> bool:
    """Whether our kernel is the faster one for this map on this machine."""
    fits = weight.shape[1] % 2 == 0 and weight.dtype in (torch.float32, torch.bfloat16)
    return weight.device.type == "cpu" and fits and not has_matrix_unit()


def laid_out(weight: Tensor, gated: bool = False) -> Tensor:
    """Weights [columns, K] as the kernel wants them, [groups, K / per, 2, 16, per], per = numbers in 32 bits. gated:
    the upper half of the columns are gates of the lower half; a group holds 16 of each."""
    per = 2 if weight.dtype == torch.bfloat16 else 1
    inputs = weight.shape[1]
    if gated:
        halves = [F.pad(half, (0, 0, 0, -len(half) % _LANES)).view(-1, 1, _LANES, inputs) for half in weight.chunk(2)]
        panels = torch.cat(halves, 1)
    else:
        panels = F.pad(weight, (0, 0, 0, -len(weight) % _GROUP)).view(-1, 2, _LANES, inputs)
    return panels.unflatten(-1, (-1, per)).permute(0, 3, 1, 2, 4).contiguous()


class TorchMap(nn.Module):
    """x W^T + b with fixed weights, by torch."""

    def __init__(self, weight: Tensor, bias: Tensor | None, gated: bool):
        super().__init__()
        self.gated = gated
        with torch.device("meta"):
            self.map = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        self.map.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.map.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        """more: [..., columns], is added."""
        y = self.map(x)
        if self.gated:
            gate, up = y.chunk(2, -1)
            y = F.silu(gate) * up
        return y if more is None else more + y


class OwnMap(nn.Module):
    """The same by our kernel, which has to be loaded before it is called."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, gated: bool):
        super().__init__()
        self.gated, self.columns = gated, len(weight) // (2 if gated else 1)
        self.register_buffer("weight", laid_out(weight, gated))
        self.register_buffer("bias", bias)

    def extra_repr(self) -> str:
        return f"columns={self.columns}, gated={self.gated}"

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        """more: [..., columns], is added."""
        return torch.ops.bozzetto.linear(x, self.weight, self.columns, self.gated, self.bias, more)


def fixed_map(weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None, gated: bool = False) -> nn.Module:
    """A linear layer that is not trained, with copies of these in `dtype`; gated: [gate; up] rows, without bias."""
    weight = weight.detach().to(dtype).contiguous()
    bias = None if bias is None else bias.detach().to(dtype).contiguous()
    return (OwnMap if own_linear_pays(weight) else TorchMap)(weight, bias, gated)
