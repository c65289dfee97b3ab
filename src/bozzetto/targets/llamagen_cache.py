"""The cached LlamaGen decoder: static key/value cache, ragged positions, guidance rows in one pass.

A condition of T tokens (captions) fills T - 1 slots when the session begins; its last token is input 0 of the first
pass, as a class is. With T = 1 there is nothing to fill.

Weights are laid out once, w1 and w3 side by side. Keys and values of a layer are flat tables of slots, one row per
(sequence, input), so that ragged writes are one index_copy_ each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.drafts import CODES, Layout
from bozzetto.errors import UsageError
from bozzetto.runtime.attention import attend
from bozzetto.runtime.dense import Dense
from bozzetto.targets.base import Scores
from bozzetto.targets.layers import additive, attention_entropy, copied, rotate_pairs, visible, whole_blocks
from bozzetto.targets.llamagen import CaptionEmbedding, LlamaGen, LlamaGenConfig, TransformerBlock, caption_sight

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_HEAD_EPS = 1e-5  # of the norms of heads
Table = tuple[Tensor, Tensor]  # keys and values of a layer, a row per slot of every sequence: [R S, d] each


@dataclass
class PackedLayer:
    """One block's maps in the compute dtype: wqkv [3d, d], wo [d, d], w13 [2f, d], w2 [d, f]; gains [d] of the norms
    (gain_1 None: no norm before the attention); head_norms: gain and bias [2, heads, hd] of layer norms of the heads of
    queries and keys, if there are."""

    wqkv: Dense
    wo: Dense
    w13: Dense
    w2: Dense
    gain_1: Tensor | None
    gain_2: Tensor
    head_norms: list[Tensor] | None = None

    @classmethod
    def of(cls, layer: TransformerBlock, dtype: torch.dtype) -> PackedLayer:
        a, f = layer.attention, layer.feed_forward
        wqkv, wo, w2 = (Dense.of(part, dtype) for part in (a.wqkv, a.wo, f.w2))
        w13 = Dense(torch.cat([f.w1.weight, f.w3.weight]), None, dtype)
        gains = layer.attention_norm.weight.to(dtype), layer.ffn_norm.weight.to(dtype)
        return cls(wqkv, wo, w13, w2, *gains)

    def run(
        self, c: Any, cache: Sequence[Tensor], x: Tensor, rotation: Tensor, slot: Tensor, mask: Tensor, attend: Attend
    ) -> Tensor:
        """c: the config; cache: keys and values of the layer, [R S, d] each, a row per slot of every sequence; x [R, W,
        d]; rotation complex64, broadcastable to [R, W, 2, H, hd/2]; slot int64 [R W], of the flat cache; mask [R, 1, W,
        S'], of its first S' columns; attend: attention of q [R, H, W, hd] to keys, values [R, H, S', hd]."""
        seen = x if self.gain_1 is None else F.rms_norm(x, (c.dim,), self.gain_1, c.norm_eps)
        qkv = self.wqkv(seen).unflatten(-1, (3, c.heads, c.head_dim))
        both = qkv[:, :, :2]
        if self.head_norms is not None:
            gain, bias = self.head_norms
            both = F.layer_norm(both, (c.head_dim,), None, None, _HEAD_EPS) * gain + bias
        q, k = rotate_pairs(both, rotation).unbind(2)
        cache[0].index_copy_(0, slot, k.reshape(-1, c.dim))
        cache[1].index_copy_(0, slot, qkv[:, :, 2].reshape(-1, c.dim))
        parts = (part.view(len(x), -1, c.heads, c.head_dim).transpose(1, 2) for part in cache)
        keys, values = (part[:, :, : mask.shape[-1]] for part in parts)
        x = x + self.wo(attend(q.transpose(1, 2), keys, values, mask).transpose(1, 2).flatten(2))
        gate, up = self.w13(F.rms_norm(x, (c.dim,), self.gain_2, c.norm_eps)).chunk(2, -1)
        return x + self.w2(F.silu(gate) * up)


class CausalTarget:
    """What decoding with a raster transformer of LlamaGen's kind needs, in `dtype` (float32 or bfloat16), on its own
    device. A family adds how tokens are embedded and what is read out."""

    config: LlamaGenConfig
    session: type[CausalSession]  # what a batch is decoded with
    step: Any = None  # compiled passes, where there are (targets/compiled.py)
    probed: int | None = None  # the block whose attention's entropy a pass adds to the features (targets/entropy.py)

    def __init__(
        self, blocks: Iterable[TransformerBlock], gain: Tensor, conditions: nn.Module, rope: Tensor, dtype: torch.dtype
    ):
        self.dtype, self.device, self.session = dtype, gain.device, CausalSession
        self.conditions = copy.deepcopy(conditions).to(dtype)
        self.layers = [PackedLayer.of(layer, dtype) for layer in blocks]
        self.gain = gain.to(dtype)
        rope = rope[self.config.condition_tokens - 1 :]  # from the last condition token on
        self.rope = torch.view_as_complex(rope.contiguous())  # complex64 [N + 1, hd/2]

    @torch.no_grad()
    def begin(self, labels: Tensor, guided: bool, max_width: int) -> CausalSession:
        """labels int64 [B] in 0..classes (classes: unconditional), or numbers of the captions given.

        Raises UsageError for a text-conditional target without captions.
        """
        return self.session(self, *self.conditions_of(labels, guided), 2 if guided else 1, max_width)

    def embed(self, inputs: Tensor, position: Tensor) -> Tensor:
        """Tokens [B, W, ...] standing at inputs `position` int64 [B, W] -> [B, W, d]."""
        raise NotImplementedError

    def read_out(self, x: Tensor) -> Scores:
        """Hidden states after the final norm, [R, W, d] -> what the pass gives."""
        raise NotImplementedError

    def conditions_of(self, labels: Tensor, guided: bool) -> tuple[Tensor, Tensor | None]:
        """Condition [R, T, d] of labels int64 [B], with the unconditional rows after the others where guided, and the
        mask [B, T] of captions."""
        raise NotImplementedError


class LlamaGenTarget(CausalTarget):
    """A LlamaGen network ready to decode."""

    tokens = CODES

    @torch.no_grad()
    def __init__(self, model: LlamaGen, dtype: torch.dtype = torch.float32):
        self.config = model.config
        self.vocab, self.length = model.config.vocab, model.config.length
        super().__init__(model.layers, model.norm.weight, model.cls_embedding, model.rope, dtype)
        self.captions: tuple[Tensor, Tensor] | None = None
        self.embedding, self.output = model.tok_embeddings.weight.to(dtype), Dense.of(model.output, dtype)

    @property
    def head(self) -> Tensor:
        """Rows of the read-out, [V, d]; a copy where their layout is the processor's own."""
        return self.output.rows()

    def embed(self, inputs: Tensor, position: Tensor) -> Tensor:
        return self.embedding[inputs]

    def read_out(self, x: Tensor) -> Scores:
        return Scores(self.output(x).float(), x)

    def with_captions(self, features: Tensor, mask: Tensor) -> LlamaGenTarget:
        """The same target with K captions in place of classes: label k is caption k.

        features [K, T, caption_dim], mask [K, T], both padded on the left (`left_pad`). Weights are shared.
        Raises UsageError for a class-conditional target and for other shapes.
        """
        c = self.config
        if not c.captioned:
            raise UsageError("this target draws classes, not captions")
        shape = (len(features), c.condition_tokens, c.caption_dim)
        if features.shape != shape or mask.shape != shape[:2]:
            raise UsageError(
                f"captions of shape {tuple(features.shape)} with a mask of {tuple(mask.shape)} are not allowed: "
                f"[K, {shape[1]}, {shape[2]}] with [K, {shape[1]}]"
            )
        other = copy.copy(self)
        other.captions = (features.to(self.device, self.dtype), mask.bool().to(self.device))
        return other

    @torch.no_grad()
    def conditions_of(self, labels: Tensor, guided: bool) -> tuple[Tensor, Tensor | None]:
        mask = None
        if isinstance(self.conditions, CaptionEmbedding):
            if self.captions is None:
                raise UsageError("this target draws captions: give it some with target.with_captions(features, mask)")
            given, mask = (part[labels] for part in self.captions)
            without = self.conditions.uncond_embedding.expand_as(given)  # under the caption's own mask
        else:
            given, without = labels, torch.full_like(labels, self.config.classes)
        given = torch.cat([given, without]) if guided else given
        return self.conditions(given), mask

    @torch.no_grad()
    def condition_features(self, labels: Tensor, guided: bool) -> Tensor:
        """Hidden states after the final norm at the condition's inputs but the last, [R, T - 1, d], as LANTERN's
        drafters are given them (arXiv 2410.03355): padding attends to the padding before it. Nothing else reads them
        there, where the model's own code lets padding see itself alone."""
        condition, mask = self.conditions_of(labels, guided)
        if mask is None:
            return condition[:, :-1]
        session, real = CausalSession(self, condition, None, 2 if guided else 1, 0), mask[:, :-1]
        causal = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool, device=real.device).tril()
        x = session._fill(condition[:, :-1], (causal & (real[:, None] | ~real[:, :, None]))[:, None])
        return F.rms_norm(x, (x.shape[-1],), self.gain, self.config.norm_eps)


class CausalSession:
    """Cache and conditions of R = copies * B sequences; `copies` is 2 under guidance.

    condition [R, T, d]; mask: bool [B, T], which condition tokens may be attended to, or None for T = 1: it may.
    """

    whole = 8  # slots per row are a multiple of this
    probing = False  # whether the layer that runs is the probed one

    def __init__(self, target: CausalTarget, condition: Tensor, mask: Tensor | None, copies: int, max_width: int):
        c = target.config
        self.target, self.copies, self.rows = target, copies, len(condition)
        self.condition = condition[:, -1:].clone()  # [R, 1, d]
        self.max_width = max_width
        self.lead = c.condition_tokens - 1  # slots before that of input 0
        needed = self.lead + c.length + max_width + self.spare(max_width)
        self.slots = -(-needed // self.whole) * self.whole
        self.open = None if mask is None else F.pad(mask, (0, self.slots - mask.shape[1]), value=True)  # [B, S]
        shape = (self.rows * self.slots, c.dim)
        blank = partial(torch.zeros, shape, dtype=target.dtype, device=target.device)
        self.cache: list[Table] = [(blank(), blank()) for _ in range(c.layers)]
        self._number_slots()
        if mask is not None and self.lead:
            self._fill(condition[:, :-1], caption_sight(mask[:, :-1], self.lead))

    def spare(self, max_width: int) -> int:
        """Slots at the end of a row that no token ever gets."""
        return 0

    def _number_slots(self) -> None:
        """first_slot [R, 1]: where input 0 of a sequence lies in the flat cache; columns [S]: the input in each slot,
        below 0 for those of the condition."""
        device = self.condition.device
        self.first_slot = torch.arange(self.rows, device=device)[:, None] * self.slots + self.lead
        self.columns = torch.arange(self.slots, device=device) - self.lead

    def _fill(self, x: Tensor, sight: Tensor) -> Tensor:
        """Run the condition tokens before the last one, x [R, T - 1, d], through the layers; what each attends to is
        sight, bool [B, 1, T - 1, T - 1]. Returns their states [R, T - 1, d], before the final norm."""
        bias = copied(additive(sight, self.target.dtype), self.copies)
        rotation = self.target.rope[:1].expand(self.lead, -1)[None, :, None, None]  # zeros
        flat = (self.first_slot + self.columns[: self.lead]).flatten()
        for number, layer in enumerate(self.target.layers):
            x = layer.run(self.target.config, self.cache[number], x, rotation, flat, bias, attend)
        return x

    @torch.no_grad()
    def score(self, inputs: Tensor, start: Tensor, furthest: int | None = None, layout: Layout | None = None) -> Scores:
        t = self.target
        offset = torch.arange(inputs.shape[1], device=inputs.device)
        slot = start[:, None] + (offset if layout is None else layout.slot)  # [B, W]
        position = start[:, None] + (offset if layout is None else layout.depth)
        reach = self.slots
        if furthest is not None:
            past = inputs.shape[1] if layout is None else layout.sees.shape[-1]
            reach = whole_blocks(self.lead + furthest + past, self.slots)
        columns = self.columns[:reach]
        seen = visible(columns, start, inputs.shape[1], layout)[:, None]  # [B, 1, W, reach]
        if self.open is not None:  # every input sees itself, even where the caption is empty
            seen = seen & self.open[:, None, None, :reach] | (slot[..., None] == columns)[:, None]
        mask = additive(seen, t.dtype)
        x = t.embed(inputs, position)
        if self.copies > 1:
            slot, position, x, mask = (copied(part, self.copies) for part in (slot, position, x, mask))
        x = torch.where(position[..., None] == 0, self.condition, x)  # [R, W, d]
        rotation = t.rope[position.clamp_max(t.config.length - 1)][:, :, None, None]  # complex64 [R, W, 1, 1, hd/2]
        flat = (self.first_slot + slot).flatten()
        for number, layer in enumerate(t.layers):
            self.probing = number == t.probed
            x = layer.run(t.config, self.cache[number], x, rotation, flat, mask, self._attend)
        x = F.rms_norm(x, (x.shape[-1],), t.gain, t.config.norm_eps)
        return t.read_out(x if t.probed is None else torch.cat([x, self.entropy.to(x.dtype)], -1))

    def compact(self, path: Tensor, start: Tensor) -> None:
        """Gathers and scatters of whole rows. path int64 [B, P]."""
        path = path[:, 1:].repeat(self.copies, 1)  # the root does not move
        first = (self.first_slot + start.repeat(self.copies)[:, None]).expand_as(path)
        to = first + torch.arange(1, path.shape[1] + 1, device=path.device)
        here, to = (first + path).flatten(), to.flatten()
        for part in (part for table in self.cache for part in table):
            part.index_copy_(0, to, part.index_select(0, here))

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        if self.probing:
            self.entropy = attention_entropy(q, keys, (mask == 0).flatten(0, 1))[..., None]
        return attend(q, keys, values, mask)

    @torch.no_grad()
    def admit(self, rows: Tensor, labels: Tensor) -> None:
        """Give batch rows int64 [n] to new images of labels int64 [n]; what they held is forgotten."""
        condition, mask = self.target.conditions_of(labels, self.copies > 1)
        batch = self.rows // self.copies
        every = torch.cat([rows + i * batch for i in range(self.copies)])
        self.condition[every] = condition[:, -1:]
        if mask is not None and self.lead:
            assert self.open is not None
            self.open[rows] = F.pad(mask, (0, self.slots - mask.shape[1]), value=True)
            self._number_slots()
            self._take_conditions(type(self)(self.target, condition, mask, self.copies, self.max_width), rows)

    def _take_conditions(self, fresh: CausalSession, rows: Tensor) -> None:
        """The condition tokens' keys and values of another session for batch rows int64 [n]."""
        shape = (self.copies, -1, self.slots, self.target.config.dim)
        for ours, theirs in zip(self.cache, fresh.cache, strict=True):
            for mine, filled in zip(ours, theirs, strict=True):
                mine.view(shape)[:, rows, : self.lead] = filled.view(shape)[:, : len(rows), : self.lead]

    def keep(self, rows: Tensor) -> None:
        batch = self.rows // self.copies
        rows = torch.cat([rows + i * batch for i in range(self.copies)])
        self.cache = [(self._kept(keys, rows), self._kept(values, rows)) for keys, values in self.cache]
        self.rows = len(rows)
        self.condition = self.condition[rows]
        self.open = None if self.open is None else self.open[rows[: len(rows) // self.copies]]
        self._number_slots()

    def _kept(self, part: Tensor, rows: Tensor) -> Tensor:
        return part.unflatten(0, (self.rows, self.slots))[rows].flatten(0, 1)
