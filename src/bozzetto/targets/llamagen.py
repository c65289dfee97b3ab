"""LlamaGen: a LLaMA-style transformer over a raster of image tokens (Sun et al., arXiv 2406.06525).

Pre-norm blocks, fused qkv, SwiGLU, no biases, 2-D rotary positions on interleaved pairs with zero rows for condition
tokens (so a condition token's rotated query and key are zero while its value flows on). Parameter names are those of
the published checkpoints. Input index 0 is the last condition token; input index i >= 1 carries token i - 1; the output
at input index i is the law of token i.

Conditions: a class (one token), or the features of a caption (120 tokens, padded on the left, padding masked).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.common.checks import Base, Count, Epsilon, Grid, Layers, Size
from bozzetto.errors import UsageError, require
from bozzetto.targets.layers import OnGrid, RMSNorm, Rotating, check_heads, rope_table, rotate, small_maps


@dataclass(frozen=True)
class LlamaGenConfig(OnGrid):
    """dim, layers, heads: transformer shape; vocab: codebook size V; grid: tokens per side (N = grid^2);
    classes: class-conditional labels (one more row is the unconditional one), 0 where captions are the condition;
    condition_tokens: T, the condition's inputs; caption_dim: length of a caption feature, 0 for classes."""

    dim: Size
    layers: Layers
    heads: Size
    vocab: Size = 16384
    grid: Grid = 16
    classes: Count = 1000
    rope_base: Base = 10000.0
    norm_eps: Epsilon = 1e-5
    ffn_multiple: Size = 256
    condition_tokens: Size = 1
    caption_dim: Count = 0

    def __post_init__(self) -> None:
        check_heads(self.dim, self.heads)
        one = self.captioned or self.condition_tokens == 1
        require(one, "condition_tokens", self.condition_tokens, "a class is one token")

    @property
    def captioned(self) -> bool:
        """Whether the condition is a caption (t2i) and not a class (c2i)."""
        return self.caption_dim > 0

    @property
    def ffn(self) -> int:
        """2/3 of 4 dim, rounded up to a multiple of `ffn_multiple`."""
        hidden = int(2 * (4 * self.dim) / 3)
        return -(-hidden // self.ffn_multiple) * self.ffn_multiple

    def rope(self) -> Tensor:
        """The table of rotations [T + N, head_dim / 2, 2]; those of the condition are zero."""
        return rope_table(self.grid, self.head_dim, self.rope_base, self.condition_tokens)


# Published sizes: dim, layers, heads.
SHAPES = {
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1280, 36, 20),
    "XXL": (1536, 48, 24),
    "XXXL": (2560, 48, 40),
    "1B": (2048, 22, 32),
    "3B": (3200, 24, 32),
    "7B": (4096, 32, 32),
}


# Some published files also hold their table of rotations; it is made anew here.
POSITIONS = "freqs_cis"


def published_config(size: str, grid: int = 16, captioned: bool = False) -> LlamaGenConfig:
    """Config of a published size at `grid` (16, 24 and 32 are 256, 384 and 512 pixels): class-conditional with the 1000
    ImageNet classes, or captioned with flan-t5-xl features."""
    if size not in SHAPES:
        raise UsageError(f"unknown LlamaGen size {size!r} (allowed: {', '.join(SHAPES)})")
    dim, layers, heads = SHAPES[size]
    config = LlamaGenConfig(dim, layers, heads, grid=grid)
    return replace(config, classes=0, condition_tokens=120, caption_dim=2048) if captioned else config


class TransformerBlock(nn.Module):
    """One pre-norm transformer block: attention with fused qkv, of which v is not rotated, and SwiGLU, w2(silu(w1 x) *
    w3 x)."""

    attention: Any
    feed_forward: Any

    def __init__(self, config: LlamaGenConfig, dropout: float):
        super().__init__()
        dim, ffn, self.heads = config.dim, config.ffn, (config.heads, config.head_dim)
        sizes = {"wqkv": (dim, 3 * dim), "wo": (dim, dim)}
        self.attention = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
        sizes = {"w1": (dim, ffn), "w3": (dim, ffn), "w2": (ffn, dim)}
        self.feed_forward = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
        self.attention_norm, self.ffn_norm = (RMSNorm(dim, config.norm_eps) for _ in range(2))
        self.drop = nn.Dropout(dropout)

    def project(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [R, W, d], rotation [R or 1, W, 1, hd/2, 2] -> rotated q, k and plain v, each [R, W, H, hd]."""
        qkv = self.attention.wqkv(self.attention_norm(x)).unflatten(-1, (3, *self.heads))
        q, k = rotate(qkv[:, :, :2], rotation.unsqueeze(2)).unbind(2)
        return q, k, qkv[:, :, 2]

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | None = None) -> Tensor:
        """Over a whole sequence x [B, W, d]: causal, or what mask bool [B, 1, W, W] allows."""
        q, k, v = (part.transpose(1, 2) for part in self.project(x, rotation))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.drop(self.attention.wo(mixed.transpose(1, 2).flatten(2)))
        f, h = self.feed_forward, self.ffn_norm(x)
        return x + self.drop(f.w2(F.silu(f.w1(h)) * f.w3(h)))


def class_embedding(config: LlamaGenConfig) -> nn.Sequential:
    """Labels int64 [B] -> [B, 1, d]. Rows 0..classes-1 are labels; row `classes` is the unconditional one."""
    table = nn.Embedding(config.classes + 1, config.dim)
    return nn.Sequential(OrderedDict(embedding_table=table, as_token=nn.Unflatten(1, (1, config.dim))))


class CaptionEmbedding(nn.Module):
    """Features of a text encoder, or the stored ones of no caption, as condition tokens."""

    uncond_embedding: Tensor  # [T, caption_dim]
    cap_proj: Any

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        sizes = {"fc1": (config.caption_dim, config.dim), "fc2": (config.dim, config.dim)}
        self.cap_proj = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
        shape = (config.condition_tokens, config.caption_dim)
        self.register_buffer("uncond_embedding", torch.randn(shape) / config.caption_dim**0.5)

    def forward(self, features: Tensor) -> Tensor:
        """[B, T, caption_dim] -> [B, T, d]."""
        return self.cap_proj.fc2(F.gelu(self.cap_proj.fc1(features), approximate="tanh"))


def left_pad(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Captions padded on the right, as a text encoder gives them, to the left, as LlamaGen wants them.

    features [B, T, C], mask [B, T] (1 or True: a real token; these come first) -> the rows rotated so that the real
    tokens come last and everything else is zero, and their mask, bool [B, T].
    """
    length = mask.shape[1]
    real = mask.bool().sum(1, keepdim=True)  # [B, 1]
    turn = (torch.arange(length, device=mask.device) + real) % length  # [B, T]
    mask = mask.bool().flip(1)
    features = features.gather(1, turn[..., None].expand_as(features))
    return features * mask[..., None].to(features.dtype), mask


def caption_sight(mask: Tensor, width: int) -> Tensor:
    """What each of `width` >= T inputs attends to under captions with mask [B, T]: bool [B, 1, width, width].

    Causal, no padding, and every input itself, so that no row of the softmax is empty.
    """
    causal = torch.ones(width, width, dtype=torch.bool, device=mask.device).tril()
    real = F.pad(mask.bool(), (0, width - mask.shape[1]), value=True)[:, None, None]
    return causal & real | torch.eye(width, dtype=torch.bool, device=mask.device)


class LlamaGen(Rotating):
    """The whole-sequence network, used for training and as the slow twin of the cached decoder."""

    layers: Any  # of TransformerBlock

    def __init__(self, config: LlamaGenConfig, dropout: float = 0.0):
        super().__init__()
        self.config = config
        self.cls_embedding = CaptionEmbedding(config) if config.captioned else class_embedding(config)
        self.tok_embeddings = nn.Embedding(config.vocab, config.dim)
        self.drop = nn.Dropout(dropout)
        self.layers = nn.ModuleList(TransformerBlock(config, dropout) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab, bias=False)
        self.turn_by(config.rope)
        small_maps(self)
        nn.init.zeros_(self.output.weight)

    def forward(self, condition: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [B, n + 1, V] of tokens 0..n, given tokens int64 [B, n] with n < N and the condition: labels int64 [B]
        (config.classes: unconditional), or caption features [B, T, caption_dim] with their mask [B, T], padded on the
        left (`left_pad`). Unconditional captions are `cls_embedding.uncond_embedding` under the caption's mask."""
        return self.output(self.features(condition, tokens, mask))

    def features(self, condition: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm, what the head sees: arguments as in `forward` -> [B, n + 1, d]."""
        x = torch.cat([self.cls_embedding(condition), self.tok_embeddings(tokens)], dim=1)
        sight = None if mask is None else caption_sight(mask, x.shape[1])
        rotation = self.rope[None, : x.shape[1], None]
        x = self.drop(x)
        for layer in self.layers:
            x = layer(x, rotation, sight)
        return self.norm(x[:, self.config.condition_tokens - 1 :])
