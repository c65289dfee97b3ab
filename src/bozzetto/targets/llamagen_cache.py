"""The cached LlamaGen decoder: static key/value cache, ragged positions, guidance rows in one pass.

A condition of T tokens (captions) fills T - 1 slots when the session begins; its last token is input 0 of the first
pass, as a class is. With T = 1 there is nothing to fill.

The layers themselves are in targets/decoder.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.drafts import CODES, Layout
from bozzetto.errors import UsageError
from bozzetto.runtime.dense import Dense
from bozzetto.runtime.engine import LayerParts, LinearMap
from bozzetto.runtime.native import need_kernels
from bozzetto.targets.base import Scores
from bozzetto.targets.decoder import Decoder, Inputs, OwnDecoder, Places, Shape, TorchDecoder, let_in
from bozzetto.targets.layers import stacked
from bozzetto.targets.llamagen import CaptionEmbedding, LlamaGen, LlamaGenConfig, TransformerBlock, caption_sight

Again = Callable[[], Any] | None  # reads a network
_WHOLE = 8  # slots of a sequence are a multiple of this


def parts_of(block: TransformerBlock) -> LayerParts:
    """A block's weights, as a decoder takes them."""
    a, f = block.attention, block.feed_forward
    w13 = torch.cat([f.w1.weight, f.w3.weight])
    gains = block.attention_norm.weight, block.ffn_norm.weight
    return LayerParts(a.wqkv.weight, a.wo.weight, w13, f.w2.weight, *gains)


def laid_out(name: str) -> Any:
    """What `lay_out` makes, when it is first asked for: a target that is run in another form holds no weights."""

    def first(target: Any) -> Any:
        target.lay_out(target.again())
        return vars(target)[name]

    return cached_property(first)


class CausalTarget:
    """What decoding with a raster transformer of LlamaGen's kind needs, in `dtype` (float32 or bfloat16), on its own
    device. A family adds how tokens are embedded and what is read out. again: reads the network when it is laid out
    (None: that is done at once)."""

    config: LlamaGenConfig
    decoder: Decoder = laid_out("decoder")
    probed: int | None = None  # the block whose attention's entropy a pass adds to the features (targets/drift.py)
    own = False  # whether passes are those of our kernels

    def __init__(self, network: Any, dtype: torch.dtype, again: Again = None):
        self.dtype, self.device, c = dtype, network.norm.weight.device, self.config
        self.conditions = copy.deepcopy(network.cls_embedding).to(dtype)
        self.turns = network.rope[c.condition_tokens - 1 : -1].float()  # [N, hd/2, 2], from the last condition token on
        self.again = again
        if again is None:
            self.lay_out(network)

    @torch.no_grad()
    def begin(self, labels: Tensor, guided: bool, max_width: int) -> CausalSession:
        """labels int64 [B] in 0..classes (classes: unconditional), or numbers of the captions given.

        Raises UsageError for a text-conditional target without captions.
        """
        return CausalSession(self, *self.conditions_of(labels, guided), 2 if guided else 1, max_width)

    @torch.no_grad()
    def lay_out(self, network: Any) -> None:
        """Bring the weights of the network into the layout of `own`'s passes."""
        c = self.config
        shape = Shape(c.dim, c.heads, c.heads, c.head_dim, c.norm_eps, self.probed)
        form = OwnDecoder if self.own else TorchDecoder
        self.decoder = form([parts_of(block) for block in network.layers], shape, self.dtype, network.norm.weight)

    def map_of(self, layer: nn.Linear, dtype: torch.dtype | None = None) -> Dense | LinearMap:
        """A linear layer in the layout of `own`'s passes."""
        return (LinearMap if self.own else Dense).of(layer, dtype or self.dtype)

    def owned(self, network: Any) -> Any:
        """The same target with passes of our kernels, on a GPU with layers that torch compiles. network: what it was
        made from. Raises UsageError where there are no kernels for it."""
        other = copy.copy(self)
        if self.device.type != "cpu" and isinstance(self.decoder, TorchDecoder):
            other.decoder = copy.copy(self.decoder)
            other.decoder.compiled = True
            return other
        need_kernels(self.dtype, self.device)
        other.own = True
        other.lay_out(network)
        return other

    def embed(self, inputs: Tensor, start: Tensor, layout: Layout | None) -> Inputs:
        """Tokens [B, W, ...] of a pass from input `start` int64 [B] on."""
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
    output: Any = laid_out("output")

    @torch.no_grad()
    def __init__(self, model: LlamaGen, dtype: torch.dtype = torch.float32, again: Again = None):
        self.config = model.config
        self.vocab, self.length = model.config.vocab, model.config.length
        super().__init__(model, dtype, again)
        self.captions: tuple[Tensor, Tensor] | None = None
        self.embedding = model.tok_embeddings.weight.to(dtype)

    def lay_out(self, network: LlamaGen) -> None:
        super().lay_out(network)
        self.output = self.map_of(network.output)

    @property
    def head(self) -> Tensor:
        """Rows of the read-out, [V, d]; a copy where their layout is the processor's own."""
        return self.output.rows()

    def embed(self, inputs: Tensor, start: Tensor, layout: Layout | None) -> Inputs:
        return Inputs(tokens=inputs, table=self.embedding)

    def read_out(self, x: Tensor) -> Scores:
        return Scores(self.output.exact(x), x)

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
        return session.fill(condition[:, :-1], causal & (real[:, None] | ~real[:, :, None]))


class CausalSession:
    """Cache and conditions of R = copies * B sequences; `copies` is 2 under guidance.

    condition [R, T, d]; mask: bool [B, T], which condition tokens may be attended to, or None for T = 1: it may.
    """

    def __init__(self, target: CausalTarget, condition: Tensor, mask: Tensor | None, copies: int, max_width: int):
        c = target.config
        self.target, self.copies, self.max_width = target, copies, max_width
        self.condition, lead = condition[:, -1].contiguous(), c.condition_tokens - 1  # [R, d]
        slots = -(-(lead + c.length + max_width) // _WHOLE) * _WHOLE
        open_ = None if mask is None else F.pad(mask, (0, slots - mask.shape[1]), value=True)  # [B, S]
        self.cache = target.decoder.cache(Places(len(condition), copies, slots, lead, target.turns, open=open_))
        if mask is not None and lead:
            self.fill(condition[:, :-1], caption_sight(mask[:, :-1], lead)[:, 0])

    def fill(self, x: Tensor, sight: Tensor) -> Tensor:
        """Run the condition tokens before the last one, x [R, T - 1, d], through the layers; what each attends to is
        sight, bool [B, T - 1, T - 1]. Returns their states [R, T - 1, d] after the final norm."""
        start = torch.full((len(sight),), -x.shape[1], device=x.device)
        return self.cache.run(Inputs(x), x.shape[1], start, seen=sight)[0]

    @torch.no_grad()
    def score(self, inputs: Tensor, start: Tensor, furthest: int | None = None, layout: Layout | None = None) -> Scores:
        t = self.target
        given = t.embed(inputs, start, layout)
        given.condition = self.condition
        x, entropy = self.cache.run(given, inputs.shape[1], start, furthest, layout)
        return t.read_out(x if entropy is None else torch.cat([x, entropy[..., None].to(x.dtype)], -1))

    def compact(self, path: Tensor, start: Tensor) -> None:
        self.cache.compact(path, start)

    @torch.no_grad()
    def admit(self, rows: Tensor, labels: Tensor) -> None:
        """Give batch rows int64 [n] to new images of labels int64 [n]; what they held is forgotten."""
        condition, mask = self.target.conditions_of(labels, self.copies > 1)
        batch = len(self.condition) // self.copies
        every = torch.cat([rows + i * batch for i in range(self.copies)])
        self.condition[every] = condition[:, -1]
        if mask is not None and self.cache.places.lead:
            fresh = type(self)(self.target, condition, mask, self.copies, self.max_width)
            self.cache.take(fresh.cache, rows)

    def keep(self, rows: Tensor) -> None:
        batch = len(self.condition) // self.copies
        self.condition = self.condition[torch.cat([rows + i * batch for i in range(self.copies)])]
        self.cache.keep(rows)

    def join(self, other: CausalSession) -> None:
        self.condition = stacked(self.condition, other.condition, self.copies)
        let_in(self.cache, other.cache)
