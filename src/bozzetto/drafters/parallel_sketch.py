"""The cached parallel drafters (parallel.py) as sketchers (grow.py): all laws of a draft after one call
of the network. Trees grow as with any sketcher, except that a law knows its depth and the token before it, no more."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bozzetto.drafters.base import Observation
from bozzetto.drafters.glance import GlanceNet, surroundings
from bozzetto.drafters.parallel import BlockNet, PlaneNet
from bozzetto.drafts import Layout
from bozzetto.runtime.dense import Dense
from bozzetto.targets.base import visible
from bozzetto.targets.llamagen_cache import copied


class ParallelSketcher:
    """embedding, head: the target's rows [V, d] for tokens, in the dtype to compute in. A kind says what its places
    are."""

    wants_features = True

    @torch.no_grad()
    def __init__(self, net: Any, embedding: Tensor, head: Tensor):
        self.net, self.config = net, net.config
        self.dtype, self.device = head.dtype, head.device
        self.embedding, self.output = embedding, Dense(head, None, head.dtype)

    def begin(self, labels: Tensor, guided: bool, max_nodes: int) -> None:
        self.copies = 2 if guided else 1
        self.rows = len(labels) * self.copies
        self.open(self.config.grid**2 + self.config.places + max_nodes + 2)

    def open(self, length: int) -> None:
        """Room for that many pairs of each row."""
        raise NotImplementedError

    def places(self, seen: Observation, at: Tensor) -> Tensor:
        """Take in what a pass committed -> the features of the next K places, [R, K, d]. at: int64 [R, 1], the last
        committed column."""
        raise NotImplementedError

    def after(self, tokens: Tensor) -> Tensor | float:
        """What the tokens before, int64 [B, n], add to logits [R, n, V]."""
        bias = self.net.bias(tokens)
        return 0.0 if bias is None else copied(bias.float(), self.copies)

    @torch.no_grad()
    def bases(self, seen: Observation) -> Tensor:
        """Take in what a pass committed -> logits float32 [R, K, V] of the next places, without what `after` adds."""
        self.hidden = self.places(seen, (seen.committed[:, None] - 1).repeat(self.copies, 1))
        self.base = self.output(self.hidden).float()
        return self.base

    @torch.no_grad()
    def extend(self, seen: Observation) -> tuple[Tensor, Tensor]:
        last = seen.verdict.tokens.gather(1, seen.committed[:, None] - 1)
        return self.bases(seen)[:, :1] + self.after(last), self.hidden[:, :1]

    @torch.no_grad()
    def grow(self, tokens: Tensor, parent: Tensor, first: int, layout: Layout) -> tuple[Tensor, Tensor]:
        # The children of a node at depth j stand at place j + 1; behind the last place its law serves again.
        place = (layout.depth + 1).clamp_max(self.config.places - 1)
        place = copied(place, self.copies) if len(place) > 1 else place.expand(self.rows, -1)
        base, hidden = (part.gather(1, _like(place, part)) for part in (self.base, self.hidden))
        return base + self.after(tokens), hidden

    def keep(self, rows: Tensor) -> None:
        batch = self.rows // self.copies
        self.kept(torch.cat([rows + i * batch for i in range(self.copies)]))
        self.rows = len(rows) * self.copies

    def kept(self, rows: Tensor) -> None:
        """Keep the given rows of what `open` made."""
        raise NotImplementedError


def _like(index: Tensor, values: Tensor) -> Tensor:
    """Index [R, n] for a gather of whole rows of values [R, m, d]."""
    return index[..., None].expand(-1, -1, values.shape[-1])


class PlaneSketcher(ParallelSketcher):
    """Heads for the right neighbours and the one below."""

    net: PlaneNet

    @torch.no_grad()
    def __init__(self, net: PlaneNet, embedding: Tensor, head: Tensor):
        super().__init__(copy.deepcopy(net).to(head.dtype), embedding, head)

    def open(self, length: int) -> None:
        shape = (self.rows, length + self.config.grid, self.config.dim)
        self.below = torch.zeros(shape, dtype=self.dtype, device=self.device)  # at i: the guess for feature i

    def places(self, seen: Observation, at: Tensor) -> Tensor:
        assert seen.features is not None
        count, c = seen.longest, self.config
        features = seen.features[:, :count].to(self.dtype)
        embedded = copied(self.embedding[seen.verdict.tokens[:, :count]], self.copies)
        start = copied(seen.start[:, None], self.copies)
        row = torch.arange(self.rows, device=self.device)[:, None]
        # What lies beyond an image's committed pairs is written again before it is read.
        self.below[row, start + torch.arange(count, device=self.device) + c.grid] = self.net.guesses_below(
            features, embedded
        )
        place = start + at + 1 + torch.arange(c.places, device=self.device)
        return self.net.places(
            features.gather(1, _like(at, features))[:, 0],
            embedded.gather(1, _like(at, embedded))[:, 0],
            self.below[row, place],
        )

    def kept(self, rows: Tensor) -> None:
        self.below = self.below[rows]


class BlockSketcher(ParallelSketcher):
    """Marked places over cached contexts. Slot i of a row's cache holds pair i; the places lie behind the committed
    pairs and are written over by the next pass."""

    net: BlockNet

    @torch.no_grad()
    def __init__(self, net: BlockNet, embedding: Tensor, head: Tensor):
        cast = copy.deepcopy(net).to(head.dtype)
        cast.rope = net.rope.float()
        super().__init__(cast, embedding, head)

    def open(self, length: int) -> None:
        c = self.config
        shape = (c.layers, 2, self.rows, length, c.heads, c.head_dim)
        self.cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self.columns = torch.arange(length, device=self.device)

    def places(self, seen: Observation, at: Tensor) -> Tensor:
        assert seen.features is not None
        c, net, count = self.config, self.net, seen.longest
        embedded = copied(self.embedding[seen.verdict.tokens[:, :count]], self.copies)
        context = net.fc(torch.cat([embedded, seen.features[:, :count].to(self.dtype)], -1))
        start = copied(seen.start[:, None], self.copies)
        row = torch.arange(self.rows, device=self.device)[:, None]
        old, new = start + self.columns[:count], start + at + 1 + self.columns[: c.places]
        h = context.gather(1, _like(at, context)) + net.marks
        shown = visible(self.columns, (start + at + 1)[:, 0], c.places, None)
        mask = torch.zeros(shown.shape, dtype=self.dtype, device=self.device).masked_fill_(~shown, -math.inf)[:, None]
        for layer, (keys, values) in zip(net.blocks, self.cache, strict=True):
            input_ = layer.input_layernorm(h)
            for slot, part in ((old, context), (new, input_)):
                k, v = layer.kv_proj(part).chunk(2, -1)
                keys[row, slot], values[row, slot] = net.rotated(k, slot), v.unflatten(-1, (c.heads, c.head_dim))
            q = net.rotated(layer.q_proj(input_), new).transpose(1, 2)
            mixed = F.scaled_dot_product_attention(q, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask)
            h = layer.feed(h + layer.o_proj(mixed.transpose(1, 2).flatten(2)))
        return h

    def kept(self, rows: Tensor) -> None:
        self.cache = self.cache[:, :, rows]


class GlanceSketcher(ParallelSketcher):
    """What is kept of tokens and features, narrow, one row for each committed pair."""

    net: GlanceNet

    @torch.no_grad()
    def __init__(self, net: GlanceNet, embedding: Tensor, head: Tensor):
        super().__init__(copy.deepcopy(net).to(head.dtype), embedding, head)
        self.narrow = self.net.of_token(embedding)  # [V, narrow]

    def open(self, length: int) -> None:
        shape = (2, self.rows, length, self.config.narrow)  # of tokens, of features
        self.kept_of = torch.zeros(shape, dtype=self.dtype, device=self.device)

    def places(self, seen: Observation, at: Tensor) -> Tensor:
        assert seen.features is not None
        count, c = seen.longest, self.config
        features = seen.features[:, :count].to(self.dtype)
        start = copied(seen.start[:, None], self.copies)
        row = torch.arange(self.rows, device=self.device)[:, None]
        # What lies beyond an image's committed pairs is written again before it is read.
        new = start + torch.arange(count, device=self.device)
        self.kept_of[0, row, new] = copied(self.narrow[seen.verdict.tokens[:, :count]], self.copies)
        self.kept_of[1, row, new] = self.net.of_feature(features)
        last = start + at
        number = last + 1 + torch.arange(c.places, device=self.device)
        looked = [surroundings(k, number, far, last) for k, far in zip(self.kept_of, c.around, strict=True)]
        feature, end = features.gather(1, _like(at, features)), self.kept_of[0, row, last]
        return self.net.places(feature, end, torch.cat(looked, -1), number)

    def kept(self, rows: Tensor) -> None:
        self.kept_of = self.kept_of[:, rows]
