"""EAGLE-style draft model: a decoder layer, or a few, that predict the target's next hidden feature. Network, config
and cached form.

Pair i is (f_i, x_i): the target's hidden state after its final norm at input i (its head gives the law of token i) and
the token i that followed. From the pairs 0..i the network predicts f_{i+1}, and the target's frozen head turns the
prediction into a draft law of token i + 1:

    h = fc([embed(x_i); f_i]);  h += attention(h) (no norm before it);  h += SwiGLU(RMSNorm(h));  f^_{i+1} = h

Architecture: EAGLE (Li et al., arXiv 2401.15077) as adapted to image tokens by LANTERN (Jang et al., arXiv 2410.03355);
training on its own roll-out: EAGLE-3 (arXiv 2503.01840). Parameter names are those of the published drafters, so they
load as they are. The rotary position of pair i is the grid cell of token i; published drafters are given pairs of the
condition before pair 0 (EagleConfig.before). Layers after the first, which the papers have none of, are plain pre-norm
ones and begin as the identity, so that a trained drafter can be made deeper.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import addressof
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.common.checks import Base, Epsilon, Grid, Layers, Size
from bozzetto.drafters.base import DraftModel, Observation, gather_rows
from bozzetto.drafts import Layout
from bozzetto.errors import require
from bozzetto.runtime.dense import Dense
from bozzetto.runtime.engine import LayerParts, LinearMap
from bozzetto.targets.decoder import Inputs, OwnDecoder, Places, Shape, TorchDecoder, let_in
from bozzetto.targets.layers import OnGrid, RMSNorm, Rotating, check_heads, copied, rope_table, rotate, small_weights
from bozzetto.targets.llamagen import LlamaGenConfig

Rows = Literal["tokens", "head"]  # of the target that stand for a token
Before = Literal["nothing", "captions", "words"]  # in the sequences that a drafter was trained on
Conditions = Callable[[Tensor, bool], Tensor]
QUIET = {"quiet": True}  # a field that config.json holds only where it is not the usual


@dataclass(frozen=True)
class EagleConfig(OnGrid):
    """dim, heads, ffn: shape of a layer (dim is the target's); vocab, grid: the target's; embedding: which rows of the
    target stand for a token, `tokens` (its embedding) or `head` (published LlamaGen drafters); layers: how many.

    before: what precedes pair 0. nothing; captions: a pair for each condition input of a LlamaGen target but the last,
    its hidden state and token 0, without rotation (LANTERN's for LlamaGen); words: the pairs of the prompt's own words,
    and rotary positions that count from its first (LANTERN's for Anole and Lumina-mGPT). first_norm: a norm before the
    first layer's attention too; head_norms: queries and keys go through a layer norm of each head."""

    dim: Size
    heads: Size
    ffn: Size
    vocab: Size
    grid: Grid
    embedding: Rows = "tokens"
    rope_base: Base = 10000.0
    norm_eps: Epsilon = 1e-6
    layers: Layers = 1
    before: Before = field(default="nothing", metadata=QUIET)
    first_norm: bool = field(default=False, metadata=QUIET)
    head_norms: bool = field(default=False, metadata=QUIET)

    def __post_init__(self) -> None:
        check_heads(self.dim, self.heads)
        require(self.layers >= 1, "layers", self.layers, "a whole number >= 1")


def eagle_config(target: LlamaGenConfig, embedding: Rows = "tokens", layers: int = 1) -> EagleConfig:
    """A drafter with layers of the target's shape."""
    shape = (target.dim, target.heads, target.ffn, target.vocab, target.grid)
    return EagleConfig(*shape, embedding, rope_base=target.rope_base, layers=layers)


def _new_layer(config: EagleConfig, first: bool) -> nn.ModuleDict:
    """A decoder layer; its attention is written out by whoever calls it (training and cached drafting differ). first:
    without a norm before the attention, unless the config says so. Norms of heads have a gain and a bias for each head,
    as Chameleon's (arXiv 2405.09818, section 2.3)."""
    dim, ffn, heads = config.dim, config.ffn, (config.heads, config.head_dim)
    attention = nn.ModuleDict({f"{name}_proj": nn.Linear(dim, dim, bias=False) for name in "qkvo"})
    for name in "qk" if config.head_norms else "":
        both = [("weight", torch.ones(heads)), ("bias", torch.zeros(heads))]  # a mapping would be sorted
        attention[f"{name}_norm"] = nn.ParameterDict(both)
    sizes = {"gate_proj": (dim, ffn), "up_proj": (dim, ffn), "down_proj": (ffn, dim)}
    mlp = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
    before = {} if first and not config.first_norm else {"input_layernorm": RMSNorm(dim, config.norm_eps)}
    behind = RMSNorm(dim, config.norm_eps)
    return nn.ModuleDict({"self_attn": attention, "mlp": mlp, **before, "post_attention_layernorm": behind})


def _feed(layer: Any, h: Tensor) -> Tensor:
    """The part of a layer behind its attention."""
    m, seen = layer.mlp, layer.post_attention_layernorm(h)
    return h + m.down_proj(F.silu(m.gate_proj(seen)) * m.up_proj(seen))


class EagleNet(Rotating):
    """The trainable part: no embedding and no head, which are the target's own, frozen."""

    layers: Any

    def __init__(self, config: EagleConfig):
        super().__init__()
        self.config = config
        self.fc = nn.Linear(2 * config.dim, config.dim)
        self.layers = nn.ModuleList(_new_layer(config, number == 0) for number in range(config.layers))
        self.turn_by(partial(rope_table, config.grid, config.head_dim, config.rope_base))
        small_weights(self)
        for layer in self.layers[1:]:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)

    def roll_out(self, features: Tensor, embedded: Tensor, steps: int) -> list[Tensor]:
        """Predictions of `steps` roll-out steps over whole sequences, the slow twin of cached drafting.

        features: true f_0..f_{n-1} [R, n, d]; embedded: e(x_0)..e(x_{n-1}) [R, n, d]. Step k returns [R, n, d]: at pair
        i the prediction of f_{i+1} of a drafter that has seen true features up to pair i - k + 1 and its own
        predictions after that (the first k - 1 pairs of step k have too short a past; leave them out of a loss).
        """
        n = features.shape[1]
        rotation = self.rope[None, :n, None]
        at = torch.arange(n, device=features.device)
        fed, out = features, []
        seen: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in self.layers]  # keys, values of each step
        for step in range(1, steps + 1):
            h = self.fc(torch.cat([embedded, fed], -1))
            mask = _roll_out_mask(at, step).to(h.dtype)
            for layer, (keys, values) in zip(self.layers, seen, strict=True):
                q, k, v = self._project(layer, layer.input_layernorm(h) if "input_layernorm" in layer else h, rotation)
                keys.append(k)
                values.append(v)
                mixed = F.scaled_dot_product_attention(q, torch.cat(keys, 2), torch.cat(values, 2), attn_mask=mask)
                h = _feed(layer, h + layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2)))
            out.append(h)
            fed = torch.cat([features[:, :1], h[:, :-1]], 1)
        return out

    def _project(self, layer: Any, h: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[R, n, d] -> rotated q, k and plain v, [R, H, n, hd] each."""
        a, heads = layer.self_attn, (self.config.heads, self.config.head_dim)
        q, k, v = (p(h).unflatten(-1, heads) for p in (a.q_proj, a.k_proj, a.v_proj))
        return rotate(q, rotation).transpose(1, 2), rotate(k, rotation).transpose(1, 2), v.transpose(1, 2)


def _roll_out_mask(at: Tensor, step: int) -> Tensor:
    """Additive mask [n, step * n] over the keys of steps 1..step: pair i sees step-1 keys up to i - step + 1, then one
    key of each later step, its own last."""
    gap = at[:, None] - at[None, :]  # query pair minus key pair
    blocks = [gap >= step - 1] + [gap == step - m for m in range(2, step + 1)]
    return torch.zeros(len(at), step * len(at), device=at.device).masked_fill(~torch.cat(blocks, 1), -torch.inf)


def _parts(layer: Any) -> LayerParts:
    """A drafter layer's weights, as a decoder takes them."""
    a, m = layer.self_attn, layer.mlp
    wqkv = torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight])
    w13 = torch.cat([m.gate_proj.weight, m.up_proj.weight])
    before = layer.input_layernorm if "input_layernorm" in layer else None
    norms = None
    if "q_norm" in a:
        both = [[getattr(n, part) for n in (a.q_norm, a.k_norm)] for part in ("weight", "bias")]
        norms = torch.cat(both[0]), torch.cat(both[1])
    gains = None if before is None else before.weight, layer.post_attention_layernorm.weight
    return LayerParts(wqkv, a.o_proj.weight, w13, m.down_proj.weight, *gains, head_norms=norms)


_WHOLE = 8  # slots before and from the first image token on are multiples of this

# Pairs before the first image token of R rows, padded on the left: embedded tokens and features [R, L, d]; how many are
# real, int64 [R] (None: all).
Lead = tuple[Tensor, Tensor, Tensor | None]


class EagleLayerCache:
    """The cached EAGLE layers: pairs of a target feature and a token in, the next feature out.

    Slot i of the cache holds pair i, slots below 0 what stands before (`Lead`); drafted pairs lie behind the committed
    ones and are written over by the next pass.
    """

    wants_features = True
    probed: int | None = None  # the layer whose attention's `entropy` [R, n] is wanted
    entropy: Tensor

    @torch.no_grad()
    def __init__(self, net: EagleNet, dtype: torch.dtype, own: bool = False):
        """own: whether our kernels run it."""
        self.own, self.config, self.dtype, self.device, c = own, net.config, dtype, net.fc.weight.device, net.config
        self.fc = (LinearMap if own else Dense).of(net.fc, dtype)
        shape = Shape(c.dim, c.heads, c.heads, c.head_dim, c.norm_eps, self.probed)
        self.decoder = (OwnDecoder if own else TorchDecoder)([_parts(layer) for layer in net.layers], shape, dtype)
        self.turns = net.rope.float()  # [N, hd/2, 2]

    @torch.no_grad()
    def begin(self, labels: Tensor, guided: bool, max_nodes: int) -> None:
        self.copies = 2 if guided else 1
        rows, lead = len(labels) * self.copies, self.before(labels, guided)
        first, count = (0, None) if lead is None else (lead[1].shape[1], lead[2])
        if lead is not None and count is not None:  # whole blocks, so that rows of other lengths may join
            first, more = -(-first // _WHOLE) * _WHOLE, -first % _WHOLE
            embedded, features = (F.pad(part, (0, 0, more, 0)) for part in lead[:2])
            lead = embedded, features, count
        slots = -(-(first + self.config.grid**2 + 2 * max_nodes + 2) // _WHOLE) * _WHOLE
        turns, shift = self._turns(slots, first, count)
        # Where rows have prompts of their own, each stands alone.
        self.alone = count is not None
        shift = shift if shift is None or self.alone else shift.expand(len(labels))
        places = Places(rows, 1 if self.alone else self.copies, slots, first, turns, shift)
        if count is not None:
            places.open = torch.arange(slots, device=self.device) >= first - count[:, None]
        self.cache = self.decoder.cache(places)
        if lead is not None and first:
            start = torch.full((rows // places.copies,), -first, device=self.device)
            self.cache.run(Inputs(self.fc(torch.cat(lead[:2], -1))), first, start, -first)

    def before(self, labels: Tensor, guided: bool) -> Lead | None:
        """What stands before pair 0."""
        return None

    def _turns(self, slots: int, first: int, count: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rotations float32 [n, hd/2, 2] by position, and what is added to the number of a pair to give its own."""
        c = self.config
        if c.before == "captions":  # whose pairs are not turned, and not looked at by their keys: zero
            return F.pad(self.turns, (0, 0, 0, 0, 1, 0)), torch.ones(1, dtype=torch.int64, device=self.device)
        if c.before != "words":
            return self.turns, None
        rate = c.rope_base ** -(torch.arange(0, c.head_dim, 2, device=self.device).float() / c.head_dim)
        angle = torch.arange(slots + first, device=self.device)[:, None] * rate
        return torch.stack([angle.cos(), angle.sin()], -1), count

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens [B, n, ...] -> [B, n, d]."""
        raise NotImplementedError

    def take_in(self, seen: Observation) -> Tensor:
        """What a pass committed -> the prediction for the next token, hidden states [R, 1, d]."""
        assert seen.features is not None
        features = seen.features[:, : seen.longest]
        out = self._step(seen.verdict.tokens[:, : seen.longest], features, seen.start)
        self.next = seen.start + seen.committed  # slot of the first drafted pair
        self.grown = gather_rows(out, seen.committed[:, None] - 1)
        return self.grown

    def put_out(self, tokens: Tensor, parent: Tensor, layout: Layout) -> Tensor:
        """One level of drafts (as `DraftModel.grow`) -> the predictions for their children, hidden states [R, n, d]."""
        features = gather_rows(self.grown, parent.expand(len(tokens), -1))
        out = self._step(tokens, features, self.next, layout)
        self.grown = torch.cat([self.grown, out], 1)
        return out

    @torch.no_grad()
    def _step(self, tokens: Tensor, features: Tensor, start: Tensor, layout: Layout | None = None) -> Tensor:
        """tokens [B, n, ...] of pairs from `start` int64 [B] on, features [R, n, d] -> hidden states [R, n, d]."""
        x = copied(self.embed(tokens), self.copies)
        if self.alone and self.copies > 1:
            start, layout = copied(start, self.copies), layout and layout.copied(self.copies)
        given = Inputs(self.fc(torch.cat([x, features], -1)))
        hidden, entropy = self.cache.run(given, tokens.shape[1], start, None, layout)
        if entropy is not None:
            self.entropy = entropy
        return hidden

    def keep(self, rows: Tensor) -> None:
        if self.alone:
            batch = self.cache.places.rows // self.copies
            rows = torch.cat([rows + i * batch for i in range(self.copies)])
        self.cache.keep(rows)

    def join(self, other: Any) -> None:
        more = other.cache.places.lead - self.cache.places.lead
        if more:
            (self if more > 0 else other).cache.more_lead(abs(more))
        if len(other.cache.turns) > len(self.cache.turns):
            self.cache.turns = other.cache.turns
        let_in(self.cache, other.cache, self.copies if self.alone else 1)


class CachedEagle(EagleLayerCache, DraftModel):
    """The cached EAGLE drafter of codes: the target's head reads its predictions."""

    @torch.no_grad()
    def __init__(
        self, net: EagleNet, embedding: Tensor, output: Dense | LinearMap, conditions: Conditions | None = None
    ):
        """embedding: the target's rows [V, d] for tokens, output: its read-out, in the dtype to compute in; conditions:
        its hidden states at the condition's inputs but the last, [R, T - 1, d], which drafters ask for that begin with
        captions (labels int64 [B], whether guided)."""
        self.conditions, self.output = conditions, output
        super().__init__(net, output.dtype, isinstance(output, LinearMap))
        self.embedding = output.rows() if net.config.embedding == "head" else embedding

    @classmethod
    def of(cls, net: EagleNet, target: Any) -> CachedEagle:
        """For a LlamaGen target that is ready to decode."""
        return cls(net, target.embedding, target.output, target.condition_features)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.embedding[tokens]

    def before(self, labels: Tensor, guided: bool) -> Lead | None:
        if self.config.before != "captions" or self.conditions is None:
            return None
        features = self.conditions(labels, guided)
        return self.embedding[:1].expand(*features.shape[:2], -1), features, None

    def whole(self, seen: Observation) -> dict[str, Any] | None:
        if not self.own or (self.alone and self.copies > 1):
            return None
        assert seen.features is not None
        network, given, half = self.decoder.network, self.cache.given, int(self.dtype == torch.bfloat16)  # type: ignore[union-attr]
        maps = {"fc": self.fc.struct, "output": self.output.struct}  # type: ignore[union-attr]
        layers = {"network": addressof(network.struct), "layers": addressof(given.struct), "half": half}
        return {**layers, **maps, "table": self.embedding, "features": seen.features[:, : seen.longest].contiguous()}

    def extend(self, seen: Observation) -> tuple[Tensor, Tensor]:
        hidden = self.take_in(seen)
        return self.output.exact(hidden), hidden

    def grow(self, tokens: Tensor, parent: Tensor, first: int, layout: Layout) -> tuple[Tensor, Tensor]:
        hidden = self.put_out(tokens, parent, layout)
        return self.output.exact(hidden), hidden
