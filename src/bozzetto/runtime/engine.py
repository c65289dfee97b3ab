"""The passes of our own kernels (decoder.cpp): a whole cached decoder as one call that knows no shape.

Weights are laid out once, for any number of sequences, places and cache columns. Nothing is compiled per shape: the
kernels are built once per machine (runtime/native.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.runtime.native import ADDRESS, FLOAT, NUMBER, address_of, call, lanes, structure

BLOCK = 64  # cache columns come in whole blocks


def laid_out(weight: Tensor, gated: bool = False) -> Tensor:
    """Weights [columns, K] as the kernel wants them, [groups, K / per, 2, lanes, per], per = numbers in 32 bits. gated:
    the upper half of the columns are gates of the lower half; a group holds a register of each."""
    wide = lanes()
    per = 2 if weight.dtype == torch.bfloat16 else 1
    inputs = weight.shape[1]
    if gated:
        halves = [F.pad(half, (0, 0, 0, -len(half) % wide)).view(-1, 1, wide, inputs) for half in weight.chunk(2)]
        panels = torch.cat(halves, 1)
    else:
        panels = F.pad(weight, (0, 0, 0, -len(weight) % (2 * wide))).view(-1, 2, wide, inputs)
    return panels.unflatten(-1, (-1, per)).permute(0, 3, 1, 2, 4).contiguous()


# `Map` of linear.h; `Layer`, `Network` and `Pass` of decoder.cpp.
MapStruct = structure((ADDRESS, "weight bias"), (NUMBER, "inputs columns gated"))
_Layer = structure((MapStruct, "qkv out gate_up down"), (ADDRESS, "gain_1 gain_2 head_gain head_bias"))
_Network = structure(
    (NUMBER, "half dim heads kv_heads head_dim count"),
    (FLOAT, "eps head_eps"),
    (ctypes.POINTER(_Layer), "layers"),
    (ADDRESS, "gain"),
)
_Pass = structure(
    (NUMBER, "threads batch copies width reach slots lead"),
    (ADDRESS, "start layout_slot depth sees"),
    (NUMBER, "span layouts"),
    (ADDRESS, "open given_seen tokens table condition x"),
    (NUMBER, "x_rows"),
    (ADDRESS, "rotation shift"),
    (NUMBER, "furthest"),
    (ADDRESS, "caches hidden"),
    (NUMBER, "probed"),
    (ADDRESS, "entropy"),
)


class LinearMap:
    """x W^T + b by our kernel: weight [m, n] (gated: rows [gate; up], silu(x A^T) * (x B^T)), bias [m] or None."""

    @torch.no_grad()
    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, gated: bool = False):
        self.columns, self.dtype = len(weight) // (2 if gated else 1), dtype
        odd = weight.shape[1] % 2 if dtype == torch.bfloat16 else 0  # numbers come in words
        self.asked, self.inputs = weight.shape[1], weight.shape[1] + odd
        self.weight = laid_out(F.pad(weight.detach().to(dtype), (0, odd)), gated)
        self.bias = None if bias is None else bias.detach().to(dtype).contiguous()
        self.struct = MapStruct(address_of(self.weight), address_of(self.bias), self.inputs, self.columns, int(gated))

    @classmethod
    def of(cls, layer: nn.Linear, dtype: torch.dtype) -> LinearMap:
        """The map of a linear layer."""
        return cls(layer.weight, layer.bias, dtype)

    def rows(self) -> Tensor:
        """The weight as it was given, in torch's own layout."""
        panels = self.weight.permute(0, 2, 3, 1, 4).flatten(3)[..., : self.asked]  # [groups, 2, lanes, n]
        if self.struct.gated:
            return torch.cat([half.flatten(0, 1)[: self.columns] for half in panels.unbind(1)])
        return panels.flatten(0, 2)[: self.columns].contiguous()

    def silu(self, x: Tensor) -> Tensor:
        """silu of the same."""
        return F.silu(self(x))

    def exact(self, x: Tensor) -> Tensor:
        """The same, not rounded: float32 [..., m]."""
        return self(x, exact=True)

    def given(self, x: Tensor) -> Tensor:
        """Rows [..., n] as the kernel reads them."""
        x = x.to(self.dtype)
        return x.contiguous() if x.shape[-1] == self.inputs else F.pad(x, (0, self.inputs - x.shape[-1]))

    def __call__(self, x: Tensor, exact: bool = False) -> Tensor:
        """x [..., n] -> [..., m], in float32 where `exact`."""
        x = self.given(x)
        out = torch.empty(*x.shape[:-1], self.columns, dtype=torch.float32 if exact else self.dtype)
        half, rows = int(self.dtype == torch.bfloat16), x.numel() // max(1, x.shape[-1])
        call("bozzetto_linear", torch.get_num_threads(), half, self.struct, x, rows, out, int(exact))
        return out


def use_kernels(net: nn.Module, dtype: torch.dtype) -> None:
    """Have our kernel in place of every linear layer inside a network."""
    for module in list(net.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear:
                delattr(module, name)
                object.__setattr__(module, name, LinearMap.of(layer, dtype))  # it has no parameters


@dataclass
class LayerParts:
    """A pre-norm decoder layer. wqkv: rows of queries, keys, values; halves: whether the numbers of a head that are
    rotated together lie half a head apart (neighbours otherwise); w13: [gate; up]; head_norms: gain and bias [heads +
    kv_heads, hd] of layer norms of queries' and keys' heads."""

    wqkv: Tensor
    wo: Tensor
    w13: Tensor
    w2: Tensor
    gain_1: Tensor | None
    gain_2: Tensor
    qkv_bias: Tensor | None = None
    head_norms: tuple[Tensor, Tensor] | None = None
    halves: bool = False
    out_bias: Tensor | None = None


class Network:
    """A stack of layers in `dtype` (float32 or bfloat16). gain: of the norm after the last layer, None: there is
    none."""

    @torch.no_grad()
    def __init__(
        self,
        parts: Iterable[LayerParts],
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        eps: float,
        gain: Tensor | None,
        head_eps: float,
    ):
        self.dtype, self.heads, self.kv_heads, self.head_dim = dtype, heads, kv_heads, head_dim
        self.maps: list[LinearMap] = []  # four of every layer: queries with keys and values, output, gated, down
        self.kept: list[Any] = []  # what else the addresses below are of
        layers = [self._layer(part) for part in parts]
        self.dim, self.count = layers[0].down.columns, len(layers)
        sizes = (int(dtype == torch.bfloat16), self.dim, heads, kv_heads, head_dim, self.count)
        self.struct = _Network(*sizes, eps, head_eps, (_Layer * self.count)(*layers), self._float(gain))

    def _float(self, part: Tensor | None) -> int | None:
        if part is None:
            return None
        self.kept.append(part.detach().float().contiguous())
        return int(self.kept[-1].data_ptr())

    def _layer(self, part: LayerParts) -> Any:
        turning = (self.heads + self.kv_heads) * self.head_dim

        def order(rows: Tensor) -> Tensor:
            """Heads' numbers that are rotated together half a head apart."""
            if part.halves:
                return rows
            pairs = rows[:turning].unflatten(0, (-1, self.head_dim // 2, 2))
            return torch.cat([pairs.transpose(1, 2).flatten(0, 2), rows[turning:]])

        bias = None if part.qkv_bias is None else order(part.qkv_bias)
        maps = [
            LinearMap(order(part.wqkv), bias, self.dtype),
            LinearMap(part.wo, part.out_bias, self.dtype),
            LinearMap(part.w13, None, self.dtype, gated=True),
            LinearMap(part.w2, None, self.dtype),
        ]
        self.maps += maps
        norms = [None, None] if part.head_norms is None else [order(p.reshape(-1)) for p in part.head_norms]
        gains = [self._float(p) for p in (part.gain_1, part.gain_2, *norms)]
        return _Layer(*(m.struct for m in maps), *gains)

    def caches(self, rows: int, slots: int) -> list[Tensor]:
        """Keys and values of every layer in turn, in the kernels' layout: [R, kv_heads, slots, numbers of a head filled
        up to whole registers]."""
        shape = (rows, self.kv_heads, slots, -(-self.head_dim // lanes()) * lanes())
        return [torch.zeros(shape, dtype=self.dtype) for _ in range(2 * self.count)]


class Pass:
    """The passes over one set of caches. turns: float32 [n, hd/2, 2], rotations by position; see decoder.cpp."""

    def __init__(self, caches: list[Tensor], turns: Tensor, copies: int, lead: int, probed: int | None):
        self.caches = (ctypes.c_void_p * len(caches))(*(part.data_ptr() for part in caches))
        self.struct = _Pass(copies=copies, lead=lead, probed=-1 if probed is None else probed)
        self.struct.rotation, self.struct.furthest = turns.data_ptr(), len(turns) - 1
        self.struct.caches, self.struct.slots = ctypes.addressof(self.caches), caches[0].shape[2]
        self.fixed = caches, turns

    def set(self, **given: Tensor | None) -> list[Tensor]:
        """Give fields the addresses of tensors; returns what has to be kept for as long as they are used."""
        held = []
        for name, part in given.items():
            if part is not None:
                part = part.contiguous()
                held.append(part)
            setattr(self.struct, name, None if part is None else part.data_ptr())
        return held

    def run(
        self, network: Network, width: int, start: Tensor, reach: int, **given: Any
    ) -> tuple[Tensor, Tensor | None]:
        p, d, batch = self.struct, network, len(start)
        absent = dict.fromkeys(("layout_slot", "depth", "sees", "given_seen"))
        if (sees := given.get("sees")) is not None:
            p.span, p.layouts = sees.shape[-1], len(sees)
            given |= {name: given[name].expand(len(sees), -1) for name in ("layout_slot", "depth")}
        if (x := given.get("x")) is not None:
            p.x_rows = len(x)
        held = self.set(start=start, **absent | given)
        p.threads, p.batch, p.width, p.reach = torch.get_num_threads(), batch, width, reach
        rows = batch * p.copies
        hidden = torch.empty(rows, width, d.dim, dtype=d.dtype)
        entropy = torch.empty(rows, width) if p.probed >= 0 else None
        held += self.set(hidden=hidden, entropy=entropy)
        call("bozzetto_pass", d.struct, p)
        return hidden, entropy

    def compact(self, network: Network, path: Tensor, start: Tensor) -> None:
        """See `targets/decoder.py`."""
        p, path, start = self.struct, path.contiguous(), start.contiguous()
        numbers = (len(start), p.copies, p.slots, p.lead, path.shape[1])
        call("bozzetto_compact", network.struct, *numbers, start, path, self.caches)
