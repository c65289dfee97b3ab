"""Draft models that predict several tokens in one pass, for laws that are flat and chains that are cheap.

From the last committed pair a (the target's feature f_a and the token x_a that followed, eagle.py) they predict
features f_{a+1} .. f_{a+K} at once; the target's frozen head makes draft laws of tokens a + 1 .. a + K of them.

- `PlaneNet`: heads for the right neighbours and one for the neighbour below (SSD, arXiv 2606.20543; Hawk, arXiv
  2510.25739): every pair guesses K features to its right and the one a row further down; a token's feature is the guess
  from its left, corrected by the guess that the pair above made a row ago.
- `BlockNet`: K marked places that attend to all committed pairs and to the places before them, in every layer (DFlash),
  and a low-rank table that tells each law which token was drawn just before (DSpark).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.common.checks import Base, Epsilon, Grid, Layers, Size
from bozzetto.drafters.base import DraftModel, Observation, gather_rows
from bozzetto.drafts import Layout
from bozzetto.errors import require
from bozzetto.runtime.engine import LinearMap, use_kernels
from bozzetto.targets.layers import (
    OnGrid,
    RMSNorm,
    Rotating,
    additive,
    check_heads,
    copied,
    rope_table,
    rotate,
    small_weights,
    stacked,
    visible,
)


def check_counts(config: object, *names: str) -> None:
    """Raise UsageError for a field that is less than 1."""
    for name in names:
        require(getattr(config, name) >= 1, name, getattr(config, name), "a whole number >= 1")


@dataclass(frozen=True)
class PlaneConfig:
    """dim: the target's; vocab, grid: the target's; places: K, features guessed to the right; ffn: of a head."""

    dim: Size
    vocab: Size
    grid: Grid
    places: Layers = 12
    ffn: Size = 512

    def __post_init__(self) -> None:
        check_counts(self, "dim", "grid", "places", "ffn")
        # The guess from above has to come from a committed pair.
        require(self.places <= self.grid, "places", self.places, f"at most a row of the grid, {self.grid}")


@dataclass(frozen=True)
class BlockConfig(OnGrid):
    """dim, heads, ffn: shape of a layer (dim is the target's); vocab, grid: the target's; places: K; layers: how many;
    rank: of the table of the token before."""

    dim: Size
    heads: Size
    ffn: Size
    vocab: Size
    grid: Grid
    places: Layers = 12
    layers: Layers = 2
    rank: Size = 128
    rope_base: Base = 10000.0
    norm_eps: Epsilon = 1e-6

    def __post_init__(self) -> None:
        check_counts(self, "dim", "heads", "ffn", "grid", "places", "layers", "rank")
        check_heads(self.dim, self.heads)


def gated(h: Tensor, seen: Tensor, gate_up: nn.Module, down: nn.Module) -> Tensor:
    """h + SwiGLU(seen), gate and up in one map."""
    gate, up = gate_up(seen).chunk(2, -1)
    return h + down(F.silu(gate) * up)


def _new_head(dim: int, ffn: int) -> nn.ModuleDict:
    fc, gate_up = nn.Linear(2 * dim, dim), nn.Linear(dim, 2 * ffn, bias=False)
    down = nn.Linear(ffn, dim, bias=False)
    return nn.ModuleDict({"fc": fc, "norm": RMSNorm(dim, 1e-6), "gate_up": gate_up, "down": down})


def _guess(head: Any, z: Tensor) -> Tensor:
    """h = W z + SwiGLU(RMSNorm(W z)), one neighbour's feature from z = [f; e(x)]."""
    h = head.fc(z)
    return gated(h, head.norm(h), head.gate_up, head.down)


class PlaneNet(nn.Module):
    """right: K heads; below: one; mix: how a guess from above corrects one from the left."""

    def __init__(self, config: PlaneConfig):
        super().__init__()
        self.config = config
        self.right = nn.ModuleList(_new_head(config.dim, config.ffn) for _ in range(config.places))
        self.below = _new_head(config.dim, config.ffn)
        self.mix = nn.Parameter(torch.zeros(config.places, config.dim))
        self.turn = nn.Linear(config.dim, config.dim, bias=False)
        small_weights(self)

    def guesses_below(self, features: Tensor, embedded: Tensor) -> Tensor:
        """Of pairs [R, n, d]: the features a row below them, [R, n, d]."""
        return self.turn(_guess(self.below, torch.cat([embedded, features], -1)))

    def places(self, feature: Tensor, embedded: Tensor, above: Tensor) -> Tensor:
        """Features [..., K, d] after pairs (feature, embedded) [..., d]; above [..., K, d]: guesses from the row above,
        zeros where there is none."""
        z = torch.cat([embedded, feature], -1)
        return torch.stack([_guess(head, z) for head in self.right], -2) + self.mix * above

    def after(self, features: Tensor, embedded: Tensor, anchors: Tensor) -> Tensor:
        """Over whole sequences: pairs [R, n, d], anchors int64 [R, A] -> [R, A, K, d], features of anchors + 1 .. + K
        (beyond the sequence: of nothing)."""
        grid, count = self.config.grid, self.config.places
        below = F.pad(self.guesses_below(features, embedded), (0, 0, grid, count))  # at i: the guess for feature i
        place = anchors[..., None] + torch.arange(1, count + 1, device=anchors.device)  # [R, A, K]
        above = gather_rows(below, place.flatten(1)).unflatten(1, place.shape[1:])
        return self.places(gather_rows(features, anchors), gather_rows(embedded, anchors), above)

    def bias(self, tokens: Tensor) -> Tensor | None:
        """What a law learns from the token before: nothing."""
        return None


def _new_layer(config: BlockConfig) -> nn.ModuleDict:
    d = config.dim
    before, behind = (RMSNorm(d, config.norm_eps) for _ in range(2))
    q, kv, o = (nn.Linear(d, n * d, bias=False) for n in (1, 2, 1))
    parts = {"input_layernorm": before, "q_proj": q, "kv_proj": kv, "o_proj": o, "post_attention_layernorm": behind}
    gate_up, down = nn.Linear(d, 2 * config.ffn, bias=False), nn.Linear(config.ffn, d, bias=False)
    return nn.ModuleDict({**parts, "gate_up": gate_up, "down": down})


def _mixed_in(layer: Any, h: Tensor, mixed: Tensor) -> Tensor:
    """The part of a layer behind its attention, `mixed` [R, H, n, hd] of hidden states [R, n, d]."""
    h = h + layer.o_proj(mixed.transpose(1, 2).flatten(2))
    return gated(h, layer.post_attention_layernorm(h), layer.gate_up, layer.down)


class BlockNet(Rotating):
    """fc: pairs to contexts; marks: [K, d], what tells the places apart; before: low-rank table, token -> logits."""

    layers: Any

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.config = config
        self.fc = nn.Linear(2 * config.dim, config.dim)
        self.marks = nn.Parameter(torch.zeros(config.places, config.dim))
        self.layers = nn.ModuleList(_new_layer(config) for _ in range(config.layers))
        self.before = nn.Embedding(config.vocab, config.rank)
        self.to_logits = nn.Linear(config.rank, config.vocab, bias=False)
        self.turn_by(partial(rope_table, config.grid, config.head_dim, config.rope_base))
        small_weights(self)
        nn.init.normal_(self.marks, std=0.02)
        nn.init.zeros_(self.to_logits.weight)

    def rotated(self, x: Tensor, position: Tensor) -> Tensor:
        """x [R, n, d] at grid cells int64 [R or 1, n] -> heads, rotated: [R, n, H, hd]."""
        cell = position.clamp_max(len(self.rope) - 1)
        return rotate(x.unflatten(-1, (self.config.heads, self.config.head_dim)), self.rope[cell][:, :, None])

    def after(self, features: Tensor, embedded: Tensor, anchors: Tensor) -> Tensor:
        """As `PlaneNet.after`."""
        c, (rows, n, _) = self.config, features.shape
        context = self.fc(torch.cat([embedded, features], -1))  # [R, n, d]
        cell = torch.arange(n, device=anchors.device)
        place = (anchors[..., None] + torch.arange(1, c.places + 1, device=anchors.device)).flatten(1)  # [R, A K]
        h = (gather_rows(context, anchors)[:, :, None] + self.marks).flatten(1, 2)
        past = (cell <= anchors[..., None]).repeat_interleave(c.places, 1)[:, None]  # [R, 1, A K, n]
        block = torch.ones(c.places, c.places, dtype=torch.bool, device=anchors.device).tril()
        for layer in self.layers:
            seen = layer.input_layernorm(h)
            q = self.rotated(layer.q_proj(seen), place).transpose(1, 2)  # [R, H, A K, hd]
            own_k, own_v = layer.kv_proj(seen).chunk(2, -1)
            old_k, old_v = layer.kv_proj(context).chunk(2, -1)
            keys, values = self.rotated(old_k, cell[None]), old_v.unflatten(-1, (c.heads, c.head_dim))
            far = (q @ keys.permute(0, 2, 3, 1)).float().masked_fill(~past, -torch.inf)
            by_block = (-1, c.places)
            q = q.unflatten(2, by_block)  # [R, H, A, K, hd]
            own = self.rotated(own_k, place).transpose(1, 2).unflatten(2, by_block)
            near = (q @ own.transpose(-1, -2)).float().masked_fill(~block, -torch.inf).flatten(2, 3)
            shares = (torch.cat([far, near], -1) * c.head_dim**-0.5).softmax(-1).to(values.dtype)
            mixed = shares[..., :n] @ values.transpose(1, 2)
            own = own_v.unflatten(-1, (c.heads, c.head_dim)).transpose(1, 2).unflatten(2, by_block)
            mixed = mixed + (shares[..., n:].unflatten(2, by_block) @ own).flatten(2, 3)
            h = _mixed_in(layer, h, mixed)
        return h.view(rows, -1, c.places, c.dim)

    def bias(self, tokens: Tensor) -> Tensor | None:
        """Logits [..., V] that follow tokens int64 [...]."""
        return self.to_logits(self.before(tokens))


class CachedParallel(DraftModel):
    """The cached form: all laws of a draft after one call of the network. Trees grow as with any draft model, except
    that a law knows its depth and the token before it, no more. embedding: the target's rows [V, d] for tokens;
    output: its read-out, in the dtype to compute in.

    A kind says what its places are and what is `held` of committed pairs (what lies beyond these is written again
    before it is read); axis: of `held`, that of the rows.
    """

    wants_features = True
    at_once = True
    axis = 0
    table: bool | None = None  # whether laws learn from the token before, by a table (None: it is not said)
    held: Tensor

    @torch.no_grad()
    def __init__(self, net: Any, embedding: Tensor, output: Any):
        self.net, self.config = copy.deepcopy(net).to(output.dtype), net.config
        self.dtype, self.device = output.dtype, embedding.device
        self.embedding, self.output, self.own = embedding, output, isinstance(output, LinearMap)
        if self.own:
            use_kernels(self.net, self.dtype)

    @classmethod
    def of(cls, net: Any, target: Any) -> CachedParallel:
        """For a LlamaGen target that is ready to decode."""
        return cls(net, target.embedding, target.output)

    def shape(self, length: int) -> tuple[int, ...]:
        """Of `held`, with room for that many pairs of each row."""
        raise NotImplementedError

    def places(self, features: Tensor, tokens: Tensor, start: Tensor, at: Tensor) -> Tensor:
        """Take in pairs of features [R, n, d] and tokens int64 [R, n], from start int64 [R, 1] on -> the features of
        the next K places, [R, K, d]. at: int64 [R, 1], the last committed of these pairs."""
        raise NotImplementedError

    def begin(self, labels: Tensor, guided: bool, max_nodes: int) -> None:
        self.copies = 2 if guided else 1
        self.rows = len(labels) * self.copies
        shape = self.shape(self.config.grid**2 + self.config.places + max_nodes + 2)
        self.held = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self.row = torch.arange(self.rows, device=self.device)[:, None]
        self.step = torch.arange(shape[self.axis + 1], device=self.device)

    def after(self, tokens: Tensor) -> Tensor | float:
        bias = self.net.bias(tokens)
        return 0.0 if bias is None else copied(bias.float(), self.copies)

    @torch.no_grad()
    def bases(self, seen: Observation) -> Tensor:
        assert seen.features is not None
        count = seen.longest
        tokens, start, last = (
            copied(part, self.copies)
            for part in (seen.verdict.tokens[:, :count], seen.start[:, None], seen.committed[:, None] - 1)
        )
        self.hidden = self.places(seen.features[:, :count].to(self.dtype), tokens, start, last)
        self.base = self.output.exact(self.hidden)
        return self.base

    def own_bases(self, seen: Observation) -> Tensor:
        """`bases` where trees are drafted by our kernels."""
        return self.bases(seen)

    @torch.no_grad()
    def whole(self, seen: Observation) -> dict[str, Any] | None:
        if not self.own or self.table is None:
            return None
        base = self.own_bases(seen).contiguous()
        found = {"bases": base, "places": base.shape[1], "half": int(self.dtype == torch.bfloat16)}
        if not self.table:
            return found
        return {**found, "before": self.net.before.weight, "to_logits": self.net.to_logits.struct}

    @torch.no_grad()
    def extend(self, seen: Observation) -> tuple[Tensor, Tensor]:
        last = seen.verdict.tokens.gather(1, seen.committed[:, None] - 1)
        return self.bases(seen)[:, :1] + self.after(last), self.hidden[:, :1]

    @torch.no_grad()
    def grow(self, tokens: Tensor, parent: Tensor, first: int, layout: Layout) -> tuple[Tensor, Tensor]:
        # The children of a node at depth j stand at place j + 1; behind the last place its law serves again.
        place = (layout.depth + 1).clamp_max(self.config.places - 1)
        base, hidden = (gather_rows(part, place) for part in (self.base, self.hidden))
        return base + self.after(tokens), hidden

    def keep(self, rows: Tensor) -> None:
        batch = self.rows // self.copies
        self.held = self.held.index_select(self.axis, torch.cat([rows + i * batch for i in range(self.copies)]))
        self.rows = len(rows) * self.copies
        self.row = self.row[: self.rows]

    def join(self, other: Any) -> None:
        self.held, self.rows = stacked(self.held, other.held, self.copies, self.axis), self.rows + other.rows
        self.row = torch.arange(self.rows, device=self.device)[:, None]


class CachedPlane(CachedParallel):
    """Heads for the right neighbours and the one below. held: at i, the guess for feature i from a row above."""

    table = False

    def shape(self, length: int) -> tuple[int, ...]:
        return self.rows, length + self.config.grid, self.config.dim

    def places(self, features: Tensor, tokens: Tensor, start: Tensor, at: Tensor) -> Tensor:
        c, net, embedded = self.config, self.net, self.embedding[tokens]
        new = start + self.step[: tokens.shape[1]]
        self.held[self.row, new + c.grid] = net.guesses_below(features, embedded)
        above = self.held[self.row, start + at + 1 + self.step[: c.places]]
        return net.places(gather_rows(features, at)[:, 0], gather_rows(embedded, at)[:, 0], above)


class CachedBlock(CachedParallel):
    """Marked places over cached contexts. held: keys and values of every layer; slot i of a row is pair i, the places
    lie behind the committed pairs."""

    axis, table = 2, True

    @torch.no_grad()
    def __init__(self, net: BlockNet, embedding: Tensor, output: Any):
        super().__init__(net, embedding, output)
        self.net.rope = net.rope.float()

    def shape(self, length: int) -> tuple[int, ...]:
        c = self.config
        return c.layers, 2, self.rows, length, c.heads, c.head_dim

    def places(self, features: Tensor, tokens: Tensor, start: Tensor, at: Tensor) -> Tensor:
        c, net, row = self.config, self.net, self.row
        context = net.fc(torch.cat([self.embedding[tokens], features], -1))
        old, new = start + self.step[: tokens.shape[1]], start + at + 1 + self.step[: c.places]
        h = gather_rows(context, at) + net.marks
        mask = additive(visible(self.step, (start + at + 1)[:, 0], c.places, None), self.dtype)[:, None]
        for layer, (keys, values) in zip(net.layers, self.held, strict=True):
            input_ = layer.input_layernorm(h)
            for slot, part in ((old, context), (new, input_)):
                k, v = layer.kv_proj(part).chunk(2, -1)
                keys[row, slot], values[row, slot] = net.rotated(k, slot), v.unflatten(-1, (c.heads, c.head_dim))
            q = net.rotated(layer.q_proj(input_), new).transpose(1, 2)
            mixed = F.scaled_dot_product_attention(q, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask)
            h = _mixed_in(layer, h, mixed)
        return h
