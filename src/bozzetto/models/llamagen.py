"""LlamaGen: a LLaMA-style transformer over a raster of image tokens (Sun et al., arXiv 2406.06525).

Pre-norm blocks, fused qkv, SwiGLU, no biases, 2-D rotary positions on interleaved pairs with zero rows for condition
tokens (so a condition token's rotated query and key are zero while its value flows on). Parameter names are those of
the published checkpoints. Input index 0 is the condition; input index i >= 1 carries token i - 1; the output at input
index i is the law of token i.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.errors import UsageError


@dataclass(frozen=True)
class LlamaGenConfig:
    """dim, layers, heads: transformer shape; vocab: codebook size V; grid: tokens per side (N = grid^2);
    classes: class-conditional labels (one more row is the unconditional one)."""

    dim: int
    layers: int
    heads: int
    vocab: int = 16384
    grid: int = 16
    classes: int = 1000
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    ffn_multiple: int = 256

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def ffn(self) -> int:
        """2/3 of 4 dim, rounded up to a multiple of `ffn_multiple`."""
        hidden = int(2 * (4 * self.dim) / 3)
        return -(-hidden // self.ffn_multiple) * self.ffn_multiple

    @property
    def length(self) -> int:
        """Tokens per image, N."""
        return self.grid * self.grid


_SHAPES = {
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1280, 36, 20),
    "XXL": (1536, 48, 24),
    "XXXL": (2560, 48, 40),
    "1B": (2048, 22, 32),
    "3B": (3200, 24, 32),
    "7B": (4096, 32, 32),
}


def published_config(size: str, grid: int = 16) -> LlamaGenConfig:
    """Class-conditional config of a published size at `grid` (16, 24 and 32 are 256, 384 and 512 pixels)."""
    if size not in _SHAPES:
        raise UsageError(f"unknown LlamaGen size {size!r} (allowed: {', '.join(_SHAPES)})")
    dim, layers, heads = _SHAPES[size]
    return LlamaGenConfig(dim, layers, heads, grid=grid)


def rope_table(config: LlamaGenConfig, condition_tokens: int = 1) -> Tensor:
    """Rotations [condition_tokens + grid^2, head_dim / 2, 2] as (cos, sin); condition rows are zero.

    The first half of the frequencies turns with the row, the second with the column.
    """
    half = config.head_dim // 2
    frequency = 1.0 / config.rope_base ** (torch.arange(0, half, 2)[: half // 2].float() / half)
    angle = torch.outer(torch.arange(config.grid).float(), frequency)  # [grid, head_dim/4]
    by_row = angle[:, None].expand(config.grid, config.grid, -1)
    by_column = angle[None, :].expand(config.grid, config.grid, -1)
    angles = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)  # [grid^2, head_dim/2]
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([torch.zeros(condition_tokens, *table.shape[1:]), table])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate interleaved pairs. x [..., H, hd]; rotation broadcastable [..., 1, hd/2, 2]. Computed in float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, times a learned gain."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype) * self.weight.to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with fused qkv; V is not rotated."""

    def __init__(self, config: LlamaGenConfig, dropout: float):
        super().__init__()
        self.heads, self.head_dim, self.dropout = config.heads, config.head_dim, dropout
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def project(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [R, W, d], rotation [R or 1, W, 1, hd/2, 2] -> rotated q, k and plain v, each [R, W, H, hd]."""
        qkv = self.wqkv(x).unflatten(-1, (3, self.heads, self.head_dim))
        q, k = rotate(qkv[:, :, :2], rotation.unsqueeze(2)).unbind(2)
        return q, k, qkv[:, :, 2]

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Causal attention over a whole sequence (training)."""
        q, k, v = (t.transpose(1, 2) for t in self.project(x, rotation))
        p = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn, bias=False)
        self.w2 = nn.Linear(config.ffn, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: LlamaGenConfig, dropout: float):
        super().__init__()
        self.attention = Attention(config, 0.0)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.attention_norm(x), rotation))
        return x + self.drop(self.feed_forward(self.ffn_norm(x)))


class ClassEmbedding(nn.Module):
    """Rows 0..classes-1 are labels; row `classes` is the unconditional one."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.embedding_table = nn.Embedding(config.classes + 1, config.dim)


class LlamaGen(nn.Module):
    """The whole-sequence network, used for training and as the slow twin of the cached decoder."""

    rope: Tensor

    def __init__(self, config: LlamaGenConfig, dropout: float = 0.0):
        super().__init__()
        self.config = config
        self.cls_embedding = ClassEmbedding(config)
        self.tok_embeddings = nn.Embedding(config.vocab, config.dim)
        self.drop = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Block(config, dropout) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab, bias=False)
        self.register_buffer("rope", rope_table(config), persistent=False)
        self.apply(_initialise)
        nn.init.zeros_(self.output.weight)

    @property
    def blocks(self) -> list[Block]:
        """The layers, typed."""
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def forward(self, labels: Tensor, tokens: Tensor) -> Tensor:
        """labels int64 [B] (config.classes: unconditional), tokens int64 [B, n] with n < N -> logits [B, n + 1, V]."""
        return self.output(self.features(labels, tokens))

    def features(self, labels: Tensor, tokens: Tensor) -> Tensor:
        """Hidden states after the final norm, what the head sees: arguments as in `forward` -> [B, n + 1, d]."""
        x = torch.cat([self.cls_embedding.embedding_table(labels)[:, None], self.tok_embeddings(tokens)], dim=1)
        rotation = self.rope[None, : x.shape[1], None]
        x = self.drop(x)
        for layer in self.layers:
            x = layer(x, rotation)
        return self.norm(x)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def read_published(path: str | Path, config: LlamaGenConfig) -> LlamaGen:
    """Read a published class-conditional checkpoint (a torch pickle, opened with weights_only=True).

    The state may lie under `model`, `module` or `state_dict`, or be bare; a stored `freqs_cis` is ignored.
    Raises UsageError for an unreadable file, missing or misshapen keys, or non-finite weights.
    """
    from bozzetto.models.store import load_strict

    path = Path(path)
    if not path.is_file():
        raise UsageError(f"checkpoint not found: {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several unrelated types for a broken or unsafe pickle
        raise UsageError(f"{path}: not a checkpoint that can be read safely: {error}") from error
    for wrapper in ("model", "module", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected a state dict, found {type(content).__name__}")
    state = {}
    for key, value in content.items():
        if key == "freqs_cis":
            continue
        if not isinstance(value, Tensor):
            raise UsageError(f"{path}: {key!r} is not a tensor but {type(value).__name__}")
        state[key] = value.float()
        if not bool(torch.isfinite(value).all()):
            raise UsageError(f"{path}: weight {key!r} has non-finite values")
    model = LlamaGen(config)
    load_strict(model, state, path)
    return model.eval()
