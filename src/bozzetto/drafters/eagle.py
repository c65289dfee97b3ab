"""EAGLE-style drafter network: a decoder layer, or a few, that predict the target's next hidden feature.

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

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.common.checks import Base, Epsilon, Grid, Layers, Size
from bozzetto.errors import UsageError
from bozzetto.targets.llamagen import LlamaGenConfig, RMSNorm, check_heads, rope_table, rotate

Rows = Literal["tokens", "head"]  # of the target that stand for a token
Before = Literal["nothing", "captions", "words"]  # in the sequences that a drafter was trained on
QUIET = {"quiet": True}  # a field that config.json holds only where it is not the usual


@dataclass(frozen=True)
class EagleConfig:
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
        if self.layers < 1:
            raise UsageError(f"layers = {self.layers} is not allowed: a whole number >= 1")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


def eagle_config(target: LlamaGenConfig, embedding: Rows = "tokens", layers: int = 1) -> EagleConfig:
    """A drafter with layers of the target's shape."""
    shape = (target.dim, target.heads, target.ffn, target.vocab, target.grid)
    return EagleConfig(*shape, embedding, rope_base=target.rope_base, layers=layers)


class HeadNorm(nn.Module):
    """A layer norm of each head of its own, as Chameleon's (arXiv 2405.09818, section 2.3)."""

    eps = 1e-5

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(heads, head_dim)), nn.Parameter(torch.zeros(heads, head_dim))


class _SelfAttention(nn.Module):
    def __init__(self, config: EagleConfig):
        super().__init__()
        dim = config.dim
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        if config.head_norms:
            self.q_norm, self.k_norm = (HeadNorm(config.heads, config.head_dim) for _ in range(2))


class _MLP(nn.Module):
    def __init__(self, dim: int, ffn: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, ffn, bias=False)
        self.up_proj = nn.Linear(dim, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class EagleLayer(nn.Module):
    """A decoder layer; its attention is written out by whoever calls it (training and cached drafting differ). first:
    without a norm before the attention, unless the config says so."""

    def __init__(self, config: EagleConfig, first: bool):
        super().__init__()
        self.self_attn = _SelfAttention(config)
        self.mlp = _MLP(config.dim, config.ffn)
        self.input_layernorm = None if first and not config.first_norm else RMSNorm(config.dim, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)

    def before(self, h: Tensor) -> Tensor:
        """What the attention sees of hidden states."""
        return h if self.input_layernorm is None else self.input_layernorm(h)


class EagleNet(nn.Module):
    """The trainable part: no embedding and no head, which are the target's own, frozen."""

    rope: Tensor

    def __init__(self, config: EagleConfig):
        super().__init__()
        self.config = config
        self.fc = nn.Linear(2 * config.dim, config.dim)
        self.layers = nn.ModuleList(EagleLayer(config, number == 0) for number in range(config.layers))
        self.register_buffer("rope", rope_table(_as_target(config), 0), persistent=False)  # [N, hd/2, 2]
        for name, weight in self.named_parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)
        for layer in self.blocks[1:]:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)

    def reset_rope(self) -> None:
        """Compute the table of rotations, which is not stored (for a model that was made on the meta device)."""
        self.rope = rope_table(_as_target(self.config), 0)

    @property
    def blocks(self) -> list[EagleLayer]:
        """The layers, typed."""
        return [layer for layer in self.layers if isinstance(layer, EagleLayer)]

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
            for layer, (keys, values) in zip(self.blocks, seen, strict=True):
                q, k, v = self._project(layer, layer.before(h), rotation)
                keys.append(k)
                values.append(v)
                mixed = F.scaled_dot_product_attention(q, torch.cat(keys, 2), torch.cat(values, 2), attn_mask=mask)
                h = h + layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
                h = h + layer.mlp(layer.post_attention_layernorm(h))
            out.append(h)
            fed = torch.cat([features[:, :1], h[:, :-1]], 1)
        return out

    def _project(self, layer: EagleLayer, h: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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


def _as_target(config: EagleConfig) -> LlamaGenConfig:
    return LlamaGenConfig(config.dim, 1, config.heads, config.vocab, config.grid, rope_base=config.rope_base)
