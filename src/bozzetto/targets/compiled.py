"""One compiled pass: the transformer of a causal target as one graph of static shapes, weights packed in once.

A graph is made per shape, (sequences, places) as sessions round them (targets/compiled_cache.py), when one first asks;
only the number of cache columns that a pass looks at may change. The key/value caches are inputs that the graph changes
in place; there is one tensor per layer and kind, because Inductor copies a cache of which it is given views.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.laws.noise import gumbel_rows
from bozzetto.runtime.graphs import Compiler, Graph
from bozzetto.runtime.linear import fixed_map
from bozzetto.runtime.native import HEAD_UNIT, load_kernels
from bozzetto.targets.layers import attention_entropy
from bozzetto.targets.llamagen import LlamaGenConfig, TransformerBlock

Caches = Sequence[Tensor]
Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Key = tuple[Any, ...]  # kind of graph, and the shapes of all that cannot change: a graph does not check them
_OWN_FROM = 4  # places of a pass from which our attention beats torch's in float32 (in bfloat16 it always does)


def bucket(count: int) -> int:
    """The next power of two."""
    return 1 << max(0, count - 1).bit_length()


class _Layer(nn.Module):
    """A block's maps, w1 and w3 side by side. The numbers of a query or key head that are rotated together, neighbours
    in the checkpoint, lie half a head apart here: their products stay the same, and vector code can rotate them."""

    def __init__(self, layer: TransformerBlock, config: LlamaGenConfig, dtype: torch.dtype):
        super().__init__()
        a, f = layer.attention, layer.feed_forward
        pairs = a.wqkv.weight.view(3, config.heads, config.head_dim // 2, 2, config.dim)
        halves = torch.cat([pairs[:2].transpose(2, 3).flatten(0, 3), pairs[2].flatten(0, 2)])
        self.wqkv = fixed_map(halves, dtype)
        self.wo, self.w2 = (fixed_map(part.weight, dtype) for part in (a.wo, f.w2))
        self.w13 = fixed_map(torch.cat([f.w1.weight, f.w3.weight]), dtype, gated=True)
        self.gain_1, self.gain_2 = (_fixed(norm.weight, dtype) for norm in (layer.attention_norm, layer.ffn_norm))


class CausalStep(nn.Module):
    """A pass as a function of tensors. embed: (inputs [B, W, ...], position int64 [B, W]) -> [B, W, d]; head: read-out
    [V, d], or None; rope: float32 [N + 1, hd/2, 2]. own_attention: use runtime/native.py, which has to be loaded;
    probed: see CausalTarget."""

    rope: Tensor
    probed: int | None = None

    def __init__(
        self,
        config: LlamaGenConfig,
        blocks: Iterable[TransformerBlock],
        gain: Tensor,
        rope: Tensor,
        embed: nn.Module,
        head: Tensor | None,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.config, self.dtype, self.embed = config, dtype, embed
        self.layers = nn.ModuleList(_Layer(block, config, dtype) for block in blocks)
        self.gain = _fixed(gain, dtype)
        self.head = None if head is None else fixed_map(head, dtype)
        self.register_buffer("rope", rope.float().transpose(1, 2).contiguous())
        self.own_attention = self.steady = False

    def extra_repr(self) -> str:
        probed = "" if self.probed is None else f", probed={self.probed}"
        return f"{self.config}, own_attention={self.own_attention}, steady={self.steady}{probed}"

    @property
    def paired(self) -> bool:
        """Whether values lie in pairs of columns (runtime/native.py)."""
        return self.own_attention and self.dtype == torch.bfloat16

    def forward(
        self, inputs: Tensor, slot: Tensor, position: Tensor, seen: Tensor, condition: Tensor, *caches: Tensor
    ) -> tuple[Tensor, ...]:
        """inputs [B, W, ...]; slot, position: int64 [B, W]; seen: bool [B, W, C], which of the first C cache columns
        each input attends to; condition [R, 1, d] with R = B, or 2 B under guidance; caches: keys and values of every
        layer in turn, [R, heads, S, hd] (values in pairs: [R, heads, S/2, hd, 2]), changed in place. Returns hidden
        states [R, W, d] after the final norm (and, where a block is probed, its entropy behind them), and logits
        float32 [R, W, V] where there is a head."""
        c, copies = self.config, len(condition) // len(inputs)
        x, own = self.embed(inputs, position), slot
        if copies > 1:
            x, slot, position = x.repeat(copies, 1, 1), slot.repeat(copies, 1), position.repeat(copies, 1)
        row = torch.arange(len(condition), device=x.device)[:, None, None]
        head = torch.arange(c.heads, device=x.device)
        attend = self._attention(seen, own, (row, head, slot[..., None]), copies)
        x = torch.where(position[..., None] == 0, condition, x)
        rotation = self.rope[position.clamp_max(c.length - 1)][:, :, None, None]  # [R, W, 1, 1, 2, hd/2]
        measured = []
        for number, layer in enumerate(self.layers):
            x, queries = self._layer(layer, x, caches[2 * number : 2 * number + 2], rotation, attend)
            if number == self.probed:
                keys = caches[2 * number][:, :, : seen.shape[-1]]
                measured = [attention_entropy(queries.transpose(1, 2), keys, seen.repeat(copies, 1, 1))[..., None]]
        x = F.rms_norm(x, (c.dim,), self.gain, c.norm_eps)
        if measured:
            x = torch.cat([x, measured[0].to(x.dtype)], -1)
        return (x,) if self.head is None else (x, self.head(x).float())

    def _attention(self, seen: Tensor, slot: Tensor, place: tuple[Tensor, ...], copies: int) -> Attention:
        """(queries, keys and values of the pass [R, W, heads, hd], caches) -> [R, W, heads, hd]; the pass's own keys
        and values are in the caches afterwards. place: index of their columns in a cache."""
        if self.paired or (self.own_attention and (self.steady or seen.shape[1] >= _OWN_FROM)):
            return lambda *given: torch.ops.bozzetto.append_attend(*given, slot, seen, self.steady)
        reach = seen.shape[-1]
        bias = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device).masked_fill(~seen, -math.inf)
        bias = bias[:, None].repeat(copies, 1, 1, 1)

        def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            keys.index_put_(place, k)
            values.index_put_(place, v)
            keys, values = keys[:, :, :reach], values[:, :, :reach]
            return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=bias).transpose(1, 2)

        return attend

    def _layer(self, w: Any, x: Tensor, cache: Caches, rotation: Tensor, attend: Attention) -> tuple[Tensor, Tensor]:
        """x [R, W, d] -> the next one, and the layer's queries [R, W, heads, hd]."""
        c, (keys, values) = self.config, cache
        rows, width = x.shape[:2]
        qkv = w.wqkv(F.rms_norm(x, (c.dim,), w.gain_1, c.norm_eps)).view(rows, width, 3, c.heads, c.head_dim)
        q, k = _rotate(qkv[:, :, :2], rotation).unbind(2)
        x = w.wo(attend(q, k, qkv[:, :, 2], keys, values).reshape(rows, width, c.dim), x)
        return w.w2(w.w13(F.rms_norm(x, (c.dim,), w.gain_2, c.norm_eps)), x), q


class ChainStep(nn.Module):
    """A pass over plain runs of places. lead: slots before that of input 0."""

    def __init__(self, step: CausalStep, lead: int):
        super().__init__()
        self.step, self.lead = step, lead

    def extra_repr(self) -> str:
        return f"lead={self.lead}"

    def forward(
        self, inputs: Tensor, start: Tensor, sight: Tensor, condition: Tensor, *caches: Tensor
    ) -> tuple[Tensor, ...]:
        """start: int64 [B], the first input's number; sight: bool [B, C], which of the first C cache columns may be
        attended to at all. The rest as in `CausalStep.forward`."""
        position = start[:, None] + torch.arange(inputs.shape[1], device=start.device)
        slot = position + self.lead
        column = torch.arange(sight.shape[1], device=start.device)
        seen = (column <= slot[..., None]) & sight[:, None] | (column == slot[..., None])
        return self.step(inputs, slot, position, seen, condition, *caches)


class SlotStep(nn.Module):
    """A pass and what follows it (decoding/advance.py); width: places of the pass; held: tensors of the slots."""

    def __init__(self, step: ChainStep, advance: nn.Module, width: int, held: int):
        super().__init__()
        self.step, self.advance, self.width, self.held = step, advance, width, held

    def extra_repr(self) -> str:
        return f"width={self.width}, held={self.held}"

    def forward(self, sight: Tensor, condition: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """rest: the tensors of the slots, the first two their inputs and counts, then the caches."""
        state, caches = rest[: self.held], rest[self.held :]
        hidden, logits = self.step(state[0][:, : self.width], state[1], sight, condition, *caches)
        return self.advance(logits, hidden, *state)


class NoiseRows(nn.Module):
    """`laws.noise.gumbel_rows`, fused."""

    def forward(self, keys: Tensor, numbers: Tensor) -> tuple[Tensor]:
        return (gumbel_rows(keys, numbers),)


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
        self.map = fixed_map(weight, dtype, bias)
        self.positions = _fixed(positions, dtype)

    def forward(self, inputs: Tensor, position: Tensor) -> Tensor:
        known = position.clamp_max(len(self.positions) - 1)
        return self.map(inputs.to(self.positions.dtype)) + self.positions[known]


class CompiledStep:
    """Graphs of a step by shape. lead: see ChainStep."""

    def __init__(self, step: CausalStep, lead: int, compiler: Compiler):
        self.step, self.compiler = step.eval().requires_grad_(False), compiler
        if step.rope.device.type == "cpu":
            load_kernels(compiler.folder)
            step.own_attention = step.config.head_dim % HEAD_UNIT == 0
        self.chain_step, self.dtype = ChainStep(self.step, lead), step.dtype
        self.graphs: dict[Key, Graph] = {}
        self.draws: Graph | None = None

    def chain(self, inputs: Tensor, start: Tensor, sight: Tensor, *rest: Tensor) -> list[Tensor]:
        """As `ChainStep.forward`."""
        key = ("chain", inputs.shape, *_shapes(rest))
        if key not in self.graphs:
            self.graphs[key] = self._graph(key, self.chain_step, [inputs, start, sight, *rest], {2: {1: rest[1]}})
        return self.graphs[key]([inputs, start, sight, *rest])

    def tree(self, inputs: Tensor, slot: Tensor, position: Tensor, seen: Tensor, *rest: Tensor) -> list[Tensor]:
        """As `CausalStep.forward`."""
        key, arguments = ("tree", inputs.shape, *_shapes(rest)), [inputs, slot, position, seen, *rest]
        if key not in self.graphs:
            self.graphs[key] = self._graph(key, self.step, arguments, {3: {2: rest[1]}})
        return self.graphs[key](arguments)

    def slots(self, advance: nn.Module) -> Callable[[Any, int, int, list[Tensor]], list[Tensor]]:
        """A call (session, width, furthest, slot tensors) that runs a pass with `advance` behind it."""

        def run(session: Any, width: int, furthest: int, held: list[Tensor]) -> list[Tensor]:
            arguments = session.slot_arguments(width, furthest, held)
            key = (repr(advance), *_shapes(arguments[1:]))
            if key not in self.graphs:
                module = SlotStep(self.chain_step, advance, width, len(held))
                most = arguments[-2].shape[2] - 1  # the last keys
                what = f"a step of {len(arguments[1])} sequences with {width} places"
                self.graphs[key] = self.compiler.graph(module, _copies(arguments), what, {0: {1: ("reach", most)}})
            return self.graphs[key](arguments)

        return run

    def noise(self, keys: Tensor, numbers: Tensor) -> Tensor:
        """As `laws.noise.gumbel_rows`."""
        if self.draws is None:
            arguments, sizes = [keys.clone(), numbers], {0: {0: ("rows", 1 << 20)}}
            self.draws = self.compiler.graph(NoiseRows(), arguments, "the noise", sizes)
        return self.draws([keys.contiguous(), numbers])[0]

    def _graph(
        self, key: Key, module: nn.Module, arguments: list[Tensor], reach: dict[int, dict[int, Tensor]]
    ) -> Graph:
        """reach: the argument's dimension that counts cache columns, with a cache."""
        dynamic = {i: {d: ("reach", cache.shape[2] - 1) for d, cache in dims.items()} for i, dims in reach.items()}
        (_, width, *_), (rows, *_) = key[1:3]
        what = f"a pass of {rows} sequences with {width} places" + (" of a tree" if key[0] == "tree" else "")
        return self.compiler.graph(module, _copies(arguments), what, dynamic)


def _shapes(arguments: Sequence[Tensor]) -> list[torch.Size]:
    return [part.shape for part in arguments]


def _copies(arguments: Sequence[Tensor]) -> list[Tensor]:
    """What a graph may change while it is made."""
    return [part.clone() for part in arguments]


def _fixed(weight: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(dtype).contiguous(), requires_grad=False)


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """`llamagen.rotate` for pairs half a head apart: x [..., hd], rotation float32 [..., 2, hd/2] (cos, sin)."""
    first, second = x.float().chunk(2, -1)
    cos, sin = rotation.unbind(-2)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(x.dtype)
