"""The cached form of a decoder: layers of a target or of a drafter, written once, run by torch or by our own kernels.

A `Decoder` holds the weights, a `Cache` the keys and values of one batch. Both forms take the same arguments and give
the same numbers up to rounding; with our kernels a row has the same bits in a pass of any width and any batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bozzetto.drafts import Layout
from bozzetto.runtime import engine
from bozzetto.runtime.attention import attend
from bozzetto.runtime.dense import Dense
from bozzetto.runtime.engine import LayerParts
from bozzetto.targets.layers import additive, attention_entropy, copied, rotate, rotate_pairs, visible, whole_blocks

_HEAD_EPS = 1e-5  # of the norms of heads


@dataclass(frozen=True)
class Shape:
    """dim; heads of queries, and of keys and values; numbers of a head; eps of the norms; probed: the layer whose
    attention's entropy a pass tells (targets/drift.py)."""

    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    probed: int | None = None


@dataclass
class Inputs:
    """Of a pass: x [R or B, W, d] as embedded, or tokens int64 [B, W] with a table [V, d] of what stands for them;
    condition [R, d] takes the place of what stands at position 0."""

    x: Tensor | None = None
    tokens: Tensor | None = None
    table: Tensor | None = None
    condition: Tensor | None = None


@dataclass
class Places:
    """Where the slots of a cache lie and how they turn. rows: R sequences; copies: of the batch among them; slots: per
    sequence; lead: slots before that of input 0; turns: float32 [n, hd/2, 2] (cos, sin), one row per position; shift:
    int64 [B], added to positions, or None; open: bool [B, slots], which may be attended to at all, or None."""

    rows: int
    copies: int
    slots: int
    lead: int
    turns: Tensor
    shift: Tensor | None = None
    open: Tensor | None = None


class TorchDecoder:
    """Run by torch, on any device. gain: of the norm after the last layer, None: there is none; compiled: torch
    compiles the layers (for a GPU)."""

    compiled = False

    def __init__(self, parts: Sequence[LayerParts], shape: Shape, dtype: torch.dtype, gain: Tensor | None = None):
        self.shape, self.dtype, self.layers = shape, dtype, [_Layer(part, shape, dtype) for part in parts]
        self.gain = None if gain is None else gain.to(dtype)

    def cache(self, places: Places) -> TorchCache:
        return TorchCache(self, places)


class _Layer:
    """A layer's maps in the compute dtype."""

    def __init__(self, part: LayerParts, shape: Shape, dtype: torch.dtype):
        self.shape, self.halves = shape, part.halves
        self.wqkv = Dense(part.wqkv, part.qkv_bias, dtype)
        self.wo = Dense(part.wo, part.out_bias, dtype)
        self.w13, self.w2 = (Dense(weight, None, dtype) for weight in (part.w13, part.w2))
        self.gain_1, self.gain_2 = (g if g is None else g.to(dtype) for g in (part.gain_1, part.gain_2))
        self.norms = None if part.head_norms is None else [norm.to(dtype) for norm in part.head_norms]

    def project(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [R, W, d] -> rotated q [R, W, heads, hd] and k, plain v, [R, W, kv_heads, hd]."""
        s = self.shape
        seen = x if self.gain_1 is None else F.rms_norm(x, (s.dim,), self.gain_1, s.eps)
        qkv = self.wqkv(seen).unflatten(-1, (-1, s.head_dim))
        both, v = qkv.split((s.heads + s.kv_heads, s.kv_heads), 2)
        if self.norms is not None:
            both = F.layer_norm(both, (s.head_dim,), None, None, _HEAD_EPS) * self.norms[0] + self.norms[1]
        if self.halves:
            both = both.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        both = (rotate_pairs if rotation.is_complex() else rotate)(both, rotation)
        q, k = both.split((s.heads, s.kv_heads), 2)
        return q, k, v

    def mixed_in(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The part behind the attention, `mixed` [R, W, heads hd] of states x."""
        x = x + self.wo(mixed)
        gate, up = self.w13(F.rms_norm(x, (self.shape.dim,), self.gain_2, self.shape.eps)).chunk(2, -1)
        return x + self.w2(F.silu(gate) * up)


class TorchCache:
    """Keys and values of a layer are flat tables of slots, one row per (sequence, input), so that ragged writes are one
    index_copy_ each."""

    block = 1  # slots per row are a multiple of this

    def __init__(self, decoder: TorchDecoder, places: Places):
        self.decoder, self.places = decoder, places
        self.turns = torch.view_as_complex(places.turns.contiguous())
        s = decoder.shape
        blank = torch.zeros(places.rows * places.slots, s.kv_heads * s.head_dim, dtype=decoder.dtype)
        self.parts = [blank.to(self.turns.device, copy=True) for _ in range(2 * len(decoder.layers))]
        self._number_slots()

    def _number_slots(self) -> None:
        """first_slot [R, 1]: where input 0 of a sequence lies in the flat tables; columns [S]: the input in each slot,
        below 0 for those before input 0."""
        device, p = self.turns.device, self.places
        self.first_slot = torch.arange(p.rows, device=device)[:, None] * p.slots + p.lead
        self.columns = torch.arange(p.slots, device=device) - p.lead

    def run(
        self,
        inputs: Inputs,
        width: int,
        start: Tensor,
        furthest: int | None = None,
        layout: Layout | None = None,
        seen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One pass over `width` inputs from number `start` int64 [B] on (below 0: before input 0). furthest: the
        largest start where the host knows it; layout: of a tree; seen: bool [B, W, C], which of the first C slots an
        input attends to, in place of what the layout says. Returns states [R, W, d] after the last norm, and the
        entropies float32 [R, W] of the probed layer."""
        p, d = self.places, self.decoder
        offset = torch.arange(width, device=start.device)
        slot = start[:, None] + (offset if layout is None else layout.slot)  # [B, W]
        position = start[:, None] + (offset if layout is None else layout.depth)
        x = self._embedded(inputs, position)
        if seen is None:
            reach = p.slots
            if furthest is not None:
                past = width if layout is None else layout.sees.shape[-1]
                reach = whole_blocks(p.lead + furthest + past, p.slots)
            columns = self.columns[:reach]
            seen = visible(columns, start, width, layout)
            if p.open is not None:  # every input sees itself, even where the caption is empty
                seen = seen & p.open[:, None, :reach] | (slot[..., None] == columns)
        if p.shift is not None:
            position = position + p.shift[:, None]
        rotation = self.turns[position.clamp(0, len(self.turns) - 1)]
        if d.compiled:  # torch 2.13 has no code of its own for complex numbers
            rotation = torch.view_as_real(rotation)
        mask = additive(seen, d.dtype)[:, None]
        if p.copies > 1:
            slot, rotation, mask = (copied(part, p.copies) for part in (slot, rotation, mask))
        run = _compiled() if d.compiled else _layers
        return run(d, self.parts, x, rotation[:, :, None], (self.first_slot + slot).flatten(), mask)

    def _embedded(self, inputs: Inputs, position: Tensor) -> Tensor:
        x = inputs.x
        if x is None:
            assert inputs.table is not None
            x = inputs.table[inputs.tokens]
        if len(x) < self.places.rows:
            x = copied(x, self.places.rows // len(x))
        if inputs.condition is None:
            return x
        return torch.where(copied(position, self.places.copies)[..., None] == 0, inputs.condition[:, None], x)

    def compact(self, path: Tensor, start: Tensor) -> None:
        """Move what lies at slots start + path[:, t] to start + t. path int64 [B, P], rising, path[:, 0] = 0."""
        path = copied(path[:, 1:], self.places.copies)  # the root does not move
        first = (self.first_slot + copied(start, self.places.copies)[:, None]).expand_as(path)
        to = first + torch.arange(1, path.shape[1] + 1, device=path.device)
        here, to = (first + path).flatten(), to.flatten()
        for part in self.parts:
            part.index_copy_(0, to, part.index_select(0, here))

    def more_lead(self, more: int) -> None:
        """So many slots more before input 0, which nobody may attend to."""
        self.parts = [F.pad(part, (0, 0, more, 0)).flatten(0, 1) for part in self._rows()]
        _more_lead(self.places, more)
        self._number_slots()

    def _rows(self) -> list[Tensor]:
        return [part.unflatten(0, (self.places.rows, self.places.slots)) for part in self.parts]

    def keep(self, rows: Tensor) -> None:
        """Drop sequences: keep batch rows int64 [B'], of which some may be the same."""
        p, every = self.places, _every(rows, self.places)
        self.parts = [part[every].flatten(0, 1) for part in self._rows()]
        p.rows, p.open = len(every), None if p.open is None else p.open[rows]
        p.shift = None if p.shift is None else p.shift[rows]
        self._number_slots()

    def take(self, other: Any, rows: Tensor) -> None:
        """Give batch rows int64 [n] what another cache of as many slots holds."""
        every = _every(rows, self.places)
        for ours, theirs in zip(self._rows(), other._rows(), strict=True):
            ours[every] = theirs
        _take_open(self.places, other.places, rows)


def _layers(
    d: TorchDecoder, parts: list[Tensor], x: Tensor, rotation: Tensor, flat: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The layers over inputs x [R, W, d], rotation complex64 [R, W, 1, hd/2] (or float32 [..., 2]), slots flat int64
    [R W], an additive mask [R, 1, W, C]; `parts` are changed in place."""
    s, entropy = d.shape, None
    for number, layer in enumerate(d.layers):
        q, k, v = layer.project(x, rotation)
        tables = parts[2 * number : 2 * number + 2]
        for table, fresh in zip(tables, (k, v), strict=True):
            table.index_copy_(0, flat, fresh.reshape(-1, table.shape[1]))
        keys, values = (
            table.view(len(x), -1, s.kv_heads, s.head_dim)[:, : mask.shape[-1]].transpose(1, 2) for table in tables
        )
        if s.kv_heads < s.heads:
            keys, values = (part.repeat_interleave(s.heads // s.kv_heads, 1) for part in (keys, values))
        q = q.transpose(1, 2)
        if number == s.probed:
            entropy = attention_entropy(q, keys, (mask == 0).flatten(0, 1))
        x = layer.mixed_in(x, attend(q, keys, values, mask).transpose(1, 2).flatten(2))
    return (x if d.gain is None else F.rms_norm(x, (s.dim,), d.gain, s.eps)), entropy


@cache
def _compiled() -> Any:
    """The layers compiled by torch."""
    return torch.compile(_layers, dynamic=True)


def _take_open(ours: Places, theirs: Places, rows: Tensor) -> None:
    if ours.open is not None and theirs.open is not None:
        ours.open[rows] = F.pad(theirs.open, (0, ours.slots - theirs.slots), value=True)
    if ours.shift is not None and theirs.shift is not None:
        ours.shift[rows] = theirs.shift


def _more_lead(places: Places, more: int) -> None:
    places.lead, places.slots = places.lead + more, places.slots + more
    places.open = None if places.open is None else F.pad(places.open, (more, 0), value=False)


def let_in(cache: Any, other: Any, copies: int = 1) -> None:
    """Have another cache's rows behind those of a cache (also one of adapters/layers.py), of every copy of the batch
    where the cache does not know of copies."""
    known = cache.places.copies if hasattr(cache, "places") else 1
    mine, theirs = ((c.places.rows if hasattr(c, "places") else c.rows) // known // copies for c in (cache, other))
    kept, new = list[int](), list[int]()
    for i in range(copies):
        kept += [*range(i * mine, (i + 1) * mine), *[0] * theirs]
        new += range(i * (mine + theirs) + mine, (i + 1) * (mine + theirs))
    cache.keep(torch.tensor(kept))
    cache.take(other, torch.tensor(new))


def _every(rows: Tensor, places: Places) -> Tensor:
    """Batch rows -> sequences."""
    batch = places.rows // places.copies
    return torch.cat([rows + i * batch for i in range(places.copies)])


class OwnDecoder:
    """Run by our kernels, on a processor. parts: asked for one after another."""

    def __init__(self, parts: Iterable[LayerParts], shape: Shape, dtype: torch.dtype, gain: Tensor | None = None):
        self.shape, self.dtype = shape, dtype
        sizes = (shape.heads, shape.kv_heads, shape.head_dim)
        self.network = engine.Network(parts, *sizes, dtype, shape.eps, gain, _HEAD_EPS)

    def cache(self, places: Places) -> OwnCache:
        return OwnCache(self, places)


class OwnCache:
    """As TorchCache; the layout of keys and values is the kernels' (runtime/attend.h)."""

    def __init__(self, decoder: OwnDecoder, places: Places):
        self.decoder, self.places = decoder, places
        places.slots = -(-places.slots // engine.BLOCK) * engine.BLOCK
        self.parts = decoder.network.caches(places.rows, places.slots)
        self.turns = places.turns.float().contiguous()
        self._fix()

    def _fix(self) -> None:
        """What stays the same from pass to pass."""
        p, shape = self.places, self.decoder.shape
        if p.open is not None:
            more = p.slots - p.open.shape[1]
            p.open = F.pad(p.open, (0, more), value=True).contiguous()
        self.given = engine.Pass(self.parts, self.turns, p.copies, p.lead, shape.probed)
        self.given.set(open=p.open, shift=p.shift)

    def run(
        self,
        inputs: Inputs,
        width: int,
        start: Tensor,
        furthest: int | None = None,
        layout: Layout | None = None,
        seen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `TorchCache.run`."""
        p = self.places
        past = width if layout is None else layout.sees.shape[-1]
        reach = p.slots if furthest is None else min(p.slots, p.lead + furthest + past)
        if seen is not None:
            reach = seen.shape[-1]
        given: dict[str, Any] = vars(inputs) | {"given_seen": seen}
        if layout is not None:
            given |= {"layout_slot": layout.slot, "depth": layout.depth, "sees": layout.sees}
        return self.given.run(self.decoder.network, width, start, reach, **given)

    def compact(self, path: Tensor, start: Tensor) -> None:
        self.given.compact(self.decoder.network, path, start)

    def keep(self, rows: Tensor) -> None:
        p, every = self.places, _every(rows, self.places)
        self.parts = [part[every] for part in self.parts]
        p.rows, p.open = len(every), None if p.open is None else p.open[rows]
        p.shift = None if p.shift is None else p.shift[rows]
        self._fix()

    def more_lead(self, more: int) -> None:
        """As `TorchCache.more_lead`."""
        _more_lead(self.places, more)
        behind = -self.places.slots % engine.BLOCK
        self.parts = [F.pad(part, (0, 0, more, behind)) for part in self.parts]
        self.places.slots += behind
        self._fix()

    def take(self, other: Any, rows: Tensor) -> None:
        """As `TorchCache.take`, of a cache of any number of slots."""
        every, more = _every(rows, self.places), other.places.slots - self.places.slots
        if more > 0:
            self.parts = [F.pad(part, (0, 0, 0, more)) for part in self.parts]
            self.places.slots += more
            self._fix()
        for ours, theirs in zip(self.parts, other.parts, strict=True):
            ours[every, :, : theirs.shape[2]] = theirs
        _take_open(self.places, other.places, rows)


Decoder = TorchDecoder | OwnDecoder
Cache = TorchCache | OwnCache
