"""The narrow layers of a denoising head as graphs of static shapes, for the serial calls that decoding is made of.

Rows are rounded up to what has a graph already, if that is not twice as many, else to a multiple of four. Only `max`
pays: a call is small products and narrow layers around them, and without Inductor's own products nothing is fused.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.runtime.graphs import Compiler, Graph
from bozzetto.runtime.linear import fixed_map
from bozzetto.runtime.native import load_kernels
from bozzetto.targets.denoiser import Denoiser
from bozzetto.targets.heads import LN_EPS


class NarrowStep(nn.Module):
    """A denoiser without its modulations: x float32 [R, D] under modulations [..., R, (3 depth + 2) width], "1 + scale"
    in place of scale, -> float32 [..., R, out_dim]."""

    def __init__(self, net: Denoiser, dtype: torch.dtype):
        super().__init__()
        self.width, self.dtype = net.config.width, dtype
        self.input, self.output = (
            fixed_map(part.weight, torch.float32, part.bias) for part in (net.input_proj, net.final_layer.linear)
        )
        self.blocks = nn.ModuleList()
        for block in net.res_blocks:
            made = nn.Module()
            up, down = block.mlp[::2]
            made.up, made.down = (fixed_map(part.weight, dtype, part.bias) for part in (up, down))
            for name in ("weight", "bias"):
                value = getattr(block.in_ln, name).detach().to(dtype)
                made.register_buffer(name, value.clone())
            self.blocks.append(made)

    def forward(self, x: Tensor, modulation: Tensor) -> tuple[Tensor]:
        parts = modulation.to(self.dtype).split(self.width, -1)
        x = self.input(x).to(self.dtype).expand(*modulation.shape[:-1], self.width)
        block: Any
        for i, block in enumerate(self.blocks):
            shift, scale, gate = parts[3 * i : 3 * i + 3]
            h = shift + scale * F.layer_norm(x, (self.width,), block.weight, block.bias, LN_EPS)
            x = x + gate * block.down(F.silu(block.up(h)))
        shift, scale = parts[-2:]
        return (self.output((shift + scale * F.layer_norm(x, (self.width,), eps=LN_EPS)).float()),)


class CompiledNarrow:
    """Graphs of the narrow layers by shape."""

    def __init__(self, net: Denoiser, dtype: torch.dtype, compiler: Compiler):
        self.step, self.compiler = NarrowStep(net, dtype).eval().requires_grad_(False), compiler
        if net.input_proj.weight.device.type == "cpu":
            load_kernels(compiler.folder)
        self.graphs: dict[tuple[int, ...], Graph] = {}

    def __call__(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x [R, D] (leading dimensions of one are dropped) under modulations [..., R, C] -> [..., R, out_dim]."""
        *lead, rows, channels = modulation.shape
        if x.ndim > 2:
            x = x.expand(*lead, *x.shape[-2:]).flatten(0, -2)
            return self(x, modulation.flatten(0, -2)).unflatten(0, (*lead, rows))
        size = self._size((*lead,), rows)
        if size > rows:
            more = (0, 0, 0, size - rows)
            x, modulation = F.pad(x, more), F.pad(modulation, more)
        arguments, shape = [x.contiguous(), modulation.contiguous()], (*lead, size, channels)
        if shape not in self.graphs:
            what = f"a call of the head with {' x '.join(map(str, shape[:-1]))} rows"
            self.graphs[shape] = self.compiler.graph(self.step, arguments, what)
        return self.graphs[shape](arguments)[0][..., :rows, :]

    def _size(self, lead: tuple[int, ...], rows: int) -> int:
        known = [shape[-2] for shape in self.graphs if shape[:-2] == lead and rows <= shape[-2] <= 2 * rows]
        return min(known, default=rows if rows <= 2 else -(-rows // 4) * 4)
