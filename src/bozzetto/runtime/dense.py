"""A linear map of a model that is ready to decode: its weights laid out once.

On a CPU in bfloat16 a product with few rows spends more time on bringing the weights into the layout of the matrix unit
than on the product. oneDNN takes them in that layout; the products are the same to the bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ROWS = 32  # for which the layout is chosen; it serves any number


class Dense:
    """x [..., n] -> x W^T + b [..., m]. weight: [m, n] and bias: [m] or None, both brought to `dtype`; gated: the
    rows are [gate; up], and silu(gate) * up is the result."""

    @torch.no_grad()
    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, gated: bool = False):
        self.shape, self.dtype, self.gated = tuple(weight.shape), dtype, gated
        self.weight = weight.detach().to(dtype).contiguous()
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.packed = _packs(self.weight)
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, _ROWS)

    @classmethod
    def of(cls, layer: nn.Linear, dtype: torch.dtype) -> Dense:
        """The map of a linear layer."""
        return cls(layer.weight, layer.bias, dtype)

    def rows(self) -> Tensor:
        """The weight [m, n] in torch's own layout."""
        return self.weight.to_dense() if self.packed else self.weight

    def exact(self, x: Tensor) -> Tensor:
        """The same in float32."""
        return self(x).float()

    def __call__(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, up = self._product(x).chunk(2, -1)
            return F.silu(gate) * up
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    def silu(self, x: Tensor) -> Tensor:
        """silu of the same; one call where the layout is one's own."""
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "swish", [], "")
        return F.silu(F.linear(x, self.weight, self.bias))


def _packs(weight: Tensor) -> bool:
    """Whether a layout of its own pays and can be had. (In float32 few rows are fastest without.)"""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    if not (hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return False
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
