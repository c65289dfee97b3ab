"""One compiled pass: the transformer of a causal target as one graph of static shapes, weights packed in once.

A graph is made per shape, (sequences, places) as sessions round them (models/compiled_cache.py), when one first asks.
The key/value caches are inputs that the graph changes in place; there is one tensor per layer and kind, because
Inductor copies a cache of which it is given views.

On a CPU the weights become constants of the graph (Inductor's freezing), laid out for the matrix unit. `max` also lets
Inductor generate and time its own matrix products, which have the narrow layers around them fused in.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
import torch._inductor.config as inductor
import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.errors import UsageError
from bozzetto.models.llamagen import Block, LlamaGenConfig

MODES = ("off", "default", "max")
Caches = Sequence[Tensor]


def check_mode(mode: str) -> str:
    """Raise UsageError for a mode of compilation that there is not."""
    if mode not in MODES:
        raise UsageError(f"compile = {mode!r} is not allowed: {', '.join(MODES)}")
    return mode


def bucket(count: int) -> int:
    """The next power of two."""
    return 1 << max(0, count - 1).bit_length()


class _Layer(nn.Module):
    """A block's maps, w1 and w3 side by side."""

    def __init__(self, layer: Block, dtype: torch.dtype):
        super().__init__()
        a, f = layer.attention, layer.feed_forward
        self.wqkv, self.wo, self.w2 = (fixed_linear(part.weight, dtype) for part in (a.wqkv, a.wo, f.w2))
        self.w13 = fixed_linear(torch.cat([f.w1.weight, f.w3.weight]), dtype)
        self.gain_1, self.gain_2 = (_fixed(norm.weight, dtype) for norm in (layer.attention_norm, layer.ffn_norm))


class CausalStep(nn.Module):
    """A pass as a function of tensors. embed: (inputs [B, W, ...], position int64 [B, W]) -> [B, W, d]; head: read-out
    [V, d], or None; rope: float32 [N + 1, hd/2, 2]."""

    rope: Tensor

    def __init__(
        self,
        config: LlamaGenConfig,
        blocks: Sequence[Block],
        gain: Tensor,
        rope: Tensor,
        embed: nn.Module,
        head: Tensor | None,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.config, self.dtype, self.embed = config, dtype, embed
        self.layers = nn.ModuleList(_Layer(block, dtype) for block in blocks)
        self.gain = _fixed(gain, dtype)
        self.head = None if head is None else fixed_linear(head, dtype)
        self.register_buffer("rope", rope.float())

    def forward(
        self, inputs: Tensor, slot: Tensor, position: Tensor, seen: Tensor, condition: Tensor, *caches: Tensor
    ) -> tuple[Tensor, ...]:
        """inputs [B, W, ...]; slot, position: int64 [B, W]; seen: bool [B, W, S]; condition [R, 1, d] with R = B, or
        2 B under guidance; caches: keys and values of every layer in turn, [R, S, heads, hd], changed in place. Returns
        hidden states [R, W, d] after the final norm, and logits float32 [R, W, V] where there is a head."""
        c, copies = self.config, len(condition) // len(inputs)
        x = self.embed(inputs, position)
        bias = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device).masked_fill(~seen, -math.inf)[:, None]
        if copies > 1:
            x, slot, position = x.repeat(copies, 1, 1), slot.repeat(copies, 1), position.repeat(copies, 1)
            bias = bias.repeat(copies, 1, 1, 1)
        x = torch.where(position[..., None] == 0, condition, x)
        rotation = self.rope[position.clamp_max(c.length - 1)][:, :, None, None]  # [R, W, 1, 1, hd/2, 2]
        row = torch.arange(len(condition), device=x.device)[:, None]
        for number, layer in enumerate(self.layers):
            x = self._layer(layer, x, caches[2 * number : 2 * number + 2], (row, slot), rotation, bias)
        x = F.rms_norm(x, (c.dim,), self.gain, c.norm_eps)
        return (x,) if self.head is None else (x, self.head(x).float())

    def _layer(
        self, w: Any, x: Tensor, cache: Caches, place: tuple[Tensor, Tensor], rotation: Tensor, bias: Tensor
    ) -> Tensor:
        c, (keys, values) = self.config, cache
        rows, width = x.shape[:2]
        qkv = w.wqkv(F.rms_norm(x, (c.dim,), w.gain_1, c.norm_eps)).view(rows, width, 3, c.heads, c.head_dim)
        q, k = _rotate(qkv[:, :, :2], rotation).unbind(2)
        keys.index_put_(place, k)
        values.index_put_(place, qkv[:, :, 2])
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), attn_mask=bias
        )
        x = x + w.wo(mixed.transpose(1, 2).reshape(rows, width, c.dim))
        gate, up = w.w13(F.rms_norm(x, (c.dim,), w.gain_2, c.norm_eps)).chunk(2, -1)
        return x + w.w2(F.silu(gate) * up)


class TokenEmbedding(nn.Module):
    """Codes -> [B, W, d]."""

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        super().__init__()
        self.weight = _fixed(weight, dtype)

    def forward(self, inputs: Tensor, position: Tensor) -> Tensor:
        return self.weight[inputs]


class VectorEmbedding(nn.Module):
    """Continuous tokens [B, W, D] -> [B, W, d], each with its position's vector."""

    def __init__(self, weight: Tensor, bias: Tensor, positions: Tensor, dtype: torch.dtype):
        super().__init__()
        self.map = fixed_linear(weight, dtype, bias)
        self.positions = _fixed(positions, dtype)

    def forward(self, inputs: Tensor, position: Tensor) -> Tensor:
        known = position.clamp_max(len(self.positions) - 1)
        return self.map(inputs.to(self.positions.dtype)) + self.positions[known]


class CompiledStep:
    """Graphs of a step by shape. mode: `default` or `max`; report: told of every shape that is compiled."""

    def __init__(self, step: CausalStep, mode: str, report: Callable[[str], None] | None = None):
        self.step, self.mode, self.report = step.eval().requires_grad_(False), mode, report
        self.dtype = step.dtype
        self.graphs: dict[tuple[int, ...], Callable[..., tuple[Tensor, ...]]] = {}

    def __call__(self, inputs: Tensor, slot: Tensor, position: Tensor, seen: Tensor, *rest: Tensor) -> Any:
        """As `CausalStep.forward`."""
        shape = (len(rest[0]), *seen.shape)
        if shape in self.graphs:
            return self.graphs[shape](inputs, slot, position, seen, *rest)
        self._say(f"compiling a pass of {shape[0]} sequences with {shape[2]} places ...")
        began, self.graphs[shape] = time.perf_counter(), self._graph()
        # Not as options of torch.compile: Dynamo, which asks whether parameters are to be frozen, does not see those.
        with inductor.patch(self._options()):
            found = self.graphs[shape](inputs, slot, position, seen, *rest)
        self._say(f"compiled in {time.perf_counter() - began:.0f} s")
        return found

    def _say(self, line: str) -> None:
        if self.report is not None:
            self.report(line)

    def _graph(self) -> Callable[..., tuple[Tensor, ...]]:
        return torch.compile(own_code(self.step), dynamic=False, fullgraph=True)

    def _options(self) -> dict[str, bool]:
        on_cpu = self.step.rope.device.type == "cpu"
        return {"freezing" if on_cpu else "triton.cudagraphs": True, "max_autotune": self.mode == "max"}


def own_code(step: nn.Module) -> Callable[..., Any]:
    """The step as a function with a code object of its own: Dynamo keeps what it compiled, and counts it, per code."""

    def run(*arguments: Tensor) -> Any:
        return step(*arguments)

    return FunctionType(run.__code__.replace(), run.__globals__, "run", None, run.__closure__)


def _fixed(weight: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(dtype).contiguous(), requires_grad=False)


def fixed_linear(weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer that is not trained, with copies of these in `dtype`."""
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight = _fixed(weight, dtype)
    if bias is not None:
        made.bias = _fixed(bias, dtype)
    return made


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """`llamagen.rotate`: x [..., hd], rotation float32 (cos, sin), broadcastable to [..., hd/2, 2]."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2).to(x.dtype)
