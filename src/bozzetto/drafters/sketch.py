"""Sketchers: cheap causal models that drafts are grown from (the contract is in drafters/grow.py)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bozzetto.drafters.base import Observation
from bozzetto.drafters.eagle import EagleLayer, EagleNet, HeadNorm
from bozzetto.drafts import Layout
from bozzetto.runtime.attention import attend
from bozzetto.runtime.dense import Dense
from bozzetto.targets.base import Session, Target, visible
from bozzetto.targets.llamagen_cache import copied, rotate_pairs

Conditions = Callable[[Tensor, bool], Tensor]


class TargetSketcher:
    """A smaller target with the same tokenizer. Input i of it carries token i - 1, as in any target."""

    wants_features = False

    def __init__(self, target: Target):
        self.target = target

    def begin(self, labels: Tensor, guided: bool, max_nodes: int) -> None:
        # The next pass scores the last committed input again and starts up to two inputs past the image.
        self.session: Session = self.target.begin(labels, guided, max_nodes + 4)
        self.last = torch.zeros_like(labels)  # token carried by the input at which the next pass starts
        self.guided = guided

    def extend(self, seen: Observation) -> tuple[Tensor, Tensor]:
        tokens = seen.verdict.tokens[:, : seen.longest]
        scores = self.session.score(torch.cat([self.last[:, None], tokens], 1), seen.start)
        assert scores.logits is not None
        at = seen.committed[:, None]
        self.last = tokens.gather(1, at - 1)[:, 0]
        self.next = seen.start + seen.committed + 1  # the input that carries the first drafted token
        logits = _at(scores.logits, at)
        return logits, _at(scores.features, at) if scores.features is not None else logits

    def grow(self, tokens: Tensor, parent: Tensor, first: int, layout: Layout) -> tuple[Tensor, Tensor]:
        scores = self.session.score(tokens, self.next, layout=layout)
        assert scores.logits is not None
        return scores.logits, scores.logits if scores.features is None else scores.features

    def keep(self, rows: Tensor) -> None:
        self.session.keep(rows)
        self.last = self.last[rows]


def _at(values: Tensor, row: Tensor) -> Tensor:
    """values [R, W, ...] at columns row int64 [B, 1] -> [R, 1, ...]; R is B or 2B."""
    row = row.repeat(len(values) // len(row), 1)
    return values.gather(1, row[..., None].expand(-1, -1, values.shape[-1]))


class _PackedEagle:
    """A drafter layer's maps in the compute dtype."""

    def __init__(self, layer: EagleLayer, dtype: torch.dtype):
        a, m, before = layer.self_attn, layer.mlp, layer.input_layernorm
        self.wqkv = Dense(torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]), None, dtype)
        self.w13 = Dense(torch.cat([m.gate_proj.weight, m.up_proj.weight]), None, dtype)
        self.wo, self.w2 = Dense.of(a.o_proj, dtype), Dense.of(m.down_proj, dtype)
        self.before = None if before is None else before.weight.to(dtype)
        both = [getattr(a, name, None) for name in ("q_norm", "k_norm")]
        self.head_norms = (
            None if None in both else [torch.stack([getattr(n, p) for n in both]).to(dtype) for p in ("weight", "bias")]
        )
        self.gain = layer.post_attention_layernorm.weight.to(dtype)


@dataclass
class Lead:
    """Pairs before the first image token of R rows, padded on the left: embedded tokens and features [R, L, d]; count:
    int64 [R], how many are real (None: all)."""

    embedded: Tensor
    features: Tensor
    count: Tensor | None = None


class EagleLayerCache:
    """The cached EAGLE layers: pairs of a target feature and a token in, the next feature out (drafters/eagle.py).

    Slot i of the cache holds pair i, slots below 0 what stands before (`Lead`); drafted pairs lie behind the committed
    ones and are written over by the next pass.
    """

    wants_features = True

    @torch.no_grad()
    def __init__(self, net: EagleNet, dtype: torch.dtype):
        self.config, self.dtype, self.device = net.config, dtype, net.fc.weight.device
        self.fc = Dense.of(net.fc, dtype)
        self.layers = [_PackedEagle(layer, dtype) for layer in net.blocks]
        self.rope = torch.view_as_complex(net.rope.contiguous())  # complex64 [N, hd/2]
        if net.config.before == "captions":  # whose pairs are not turned, and not looked at by their keys: zero
            self.rope = torch.cat([torch.zeros_like(self.rope[:1]), self.rope])

    @torch.no_grad()
    def begin(self, labels: Tensor, guided: bool, max_nodes: int) -> None:
        self.copies = 2 if guided else 1
        self.rows = len(labels) * self.copies
        lead = self.before(labels, guided)
        first = 0 if lead is None else lead.features.shape[1]
        self.slots = -(-(first + self.config.grid**2 + 2 * max_nodes + 2) // 8) * 8
        shape = (len(self.layers), 2, self.rows * self.slots, self.config.dim)
        self.cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._number_slots(first)
        self.count = None if lead is None else lead.count
        if lead is not None and first:
            at = self.columns[:first].expand(self.rows, -1)
            seen = (at[:, None] <= at[:, :, None]) & self._open(self.columns[:first]) | (at[:, None] == at[:, :, None])
            self._run(lead.embedded, lead.features, at, at, F.pad(seen, (0, self.slots - first)))

    def _number_slots(self, first: int) -> None:
        """first_slot [R, 1]: where pair 0 of a row lies in the flat cache, behind `first` others; columns [S]: the pair
        in each slot."""
        self.first_slot = torch.arange(self.rows, device=self.device)[:, None] * self.slots + first  # [R, 1]
        self.columns = torch.arange(self.slots, device=self.device) - first

    def before(self, labels: Tensor, guided: bool) -> Lead | None:
        """What stands before pair 0."""
        return None

    def _open(self, columns: Tensor) -> Tensor:
        """Which columns are not padding, bool [R or 1, 1, S]."""
        if self.count is None:
            return torch.ones_like(columns, dtype=torch.bool)[None, None]
        return (columns >= -self.count[:, None])[:, None]

    def _turns(self, position: Tensor) -> Tensor:
        """Rotations complex64 [R, n, hd/2] of pairs int64 [R, n]."""
        c = self.config
        if c.before != "words":
            behind = int(c.before == "captions")  # the row of the table that is that of pair 0
            return self.rope[(position + behind).clamp(0, len(self.rope) - 1)]
        rate = c.rope_base ** -(torch.arange(0, c.head_dim, 2, device=self.device).float() / c.head_dim)
        place = position if self.count is None else (position + self.count[:, None]).clamp_min(0)
        angle = place[..., None] * rate
        return torch.polar(torch.ones_like(angle), angle)

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens [B, n, ...] -> [B, n, d]."""
        raise NotImplementedError

    def take_in(self, seen: Observation) -> Tensor:
        """What a pass committed -> the prediction for the next token, hidden states [R, 1, d]."""
        assert seen.features is not None
        offset = torch.arange(seen.longest, device=self.device)
        slot = seen.start[:, None] + offset
        shown = visible(self.columns, seen.start, seen.longest, None)
        features = seen.features[:, : seen.longest]
        out = self._step(seen.verdict.tokens[:, : seen.longest], features, slot, slot, shown)
        self.next = seen.start + seen.committed  # slot of the first drafted pair
        self.grown = _at(out, seen.committed[:, None] - 1)
        return self.grown

    def put_out(self, tokens: Tensor, parent: Tensor, layout: Layout) -> Tensor:
        """One level of drafts (as `Sketcher.grow`) -> the predictions for their children, hidden states [R, n, d]."""
        base = self.next[:, None]
        shown = visible(self.columns, self.next, tokens.shape[1], layout)
        parent = parent.expand(len(tokens), -1).repeat(self.copies, 1)
        features = self.grown.gather(1, parent[..., None].expand(-1, -1, self.config.dim))
        out = self._step(tokens, features, base + layout.slot, base + layout.depth, shown)
        self.grown = torch.cat([self.grown, out], 1)
        return out

    @torch.no_grad()
    def _step(self, tokens: Tensor, features: Tensor, slot: Tensor, position: Tensor, shown: Tensor) -> Tensor:
        """tokens [B, n, ...], slot, position int64 [B, n], features [R, n, d], shown bool [B, n, S] -> hidden
        states [R, n, d]."""
        x = self.embed(tokens)
        if self.copies > 1:
            slot, position, x, shown = (copied(part, self.copies) for part in (slot, position, x, shown))
        if self.count is not None:
            shown = shown & self._open(self.columns)
        return self._run(x, features, slot, position, shown)

    def _run(self, x: Tensor, features: Tensor, slot: Tensor, position: Tensor, shown: Tensor) -> Tensor:
        """The same for all R rows. x [R, n, d]: embedded tokens."""
        mask = torch.zeros(shown.shape, dtype=self.dtype, device=self.device).masked_fill_(~shown, -math.inf)
        rotation = self._turns(position)[:, :, None, None]
        h = self.fc(torch.cat([x, features], -1))
        flat = (self.first_slot + slot).flatten()
        for layer, cache in zip(self.layers, self.cache, strict=True):
            h = self._layer(layer, cache, h, rotation, flat, mask)
        return h

    def _layer(self, w: _PackedEagle, cache: Tensor, h: Tensor, rotation: Tensor, slot: Tensor, mask: Tensor) -> Tensor:
        """h [R, n, d]; cache [2, R S, d]; slot int64 [R n], of the flat cache; mask [R, n, S]."""
        c = self.config
        seen = h if w.before is None else F.rms_norm(h, (c.dim,), w.before, c.norm_eps)
        qkv = w.wqkv(seen).unflatten(-1, (3, c.heads, c.head_dim))
        both = qkv[:, :, :2]
        if w.head_norms is not None:
            gain, bias = w.head_norms
            both = F.layer_norm(both, (c.head_dim,), None, None, HeadNorm.eps) * gain + bias
        q, k = rotate_pairs(both, rotation).unbind(2)
        cache[0].index_copy_(0, slot, k.reshape(-1, c.dim))
        cache[1].index_copy_(0, slot, qkv[:, :, 2].reshape(-1, c.dim))
        keys, values = cache.view(2, self.rows, self.slots, c.heads, c.head_dim).transpose(2, 3).unbind(0)
        h = h + w.wo(self._attend(q.transpose(1, 2), keys, values, mask[:, None]).transpose(1, 2).flatten(2))
        gate, up = w.w13(F.rms_norm(h, (c.dim,), w.gain, c.norm_eps)).chunk(2, -1)
        return h + w.w2(F.silu(gate) * up)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """q [R, H, n, hd]; keys, values [R, H, S, hd]; mask [R, 1, n, S] -> [R, H, n, hd]."""
        return attend(q, keys, values, mask)

    def keep(self, rows: Tensor) -> None:
        batch = self.rows // self.copies
        rows = torch.cat([rows + i * batch for i in range(self.copies)])
        self.cache = self.cache.unflatten(2, (self.rows, self.slots))[:, :, rows].flatten(2, 3)
        self.rows, self.first_slot = len(rows), self.first_slot[: len(rows)]
        self.count = None if self.count is None else self.count[rows]


class EagleSketcher(EagleLayerCache):
    """The cached EAGLE drafter of codes: the target's head reads its predictions."""

    @torch.no_grad()
    def __init__(self, net: EagleNet, embedding: Tensor, head: Tensor, conditions: Conditions | None = None):
        """embedding, head: the target's rows [V, d] for tokens, in the dtype to compute in; conditions: its hidden
        states at the condition's inputs but the last, [R, T - 1, d], which drafters ask for that begin with captions
        (labels int64 [B], whether guided)."""
        self.conditions = conditions
        super().__init__(net, head.dtype)
        self.embedding = head if net.config.embedding == "head" else embedding
        self.output = Dense(head, None, head.dtype)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.embedding[tokens]

    def before(self, labels: Tensor, guided: bool) -> Lead | None:
        if self.config.before != "captions" or self.conditions is None:
            return None
        features = self.conditions(labels, guided)
        return Lead(self.embedding[:1].expand(*features.shape[:2], -1), features)

    def extend(self, seen: Observation) -> tuple[Tensor, Tensor]:
        hidden = self.take_in(seen)
        return self.output(hidden).float(), hidden

    def grow(self, tokens: Tensor, parent: Tensor, first: int, layout: Layout) -> tuple[Tensor, Tensor]:
        hidden = self.put_out(tokens, parent, layout)
        return self.output(hidden).float(), hidden
