"""MAR: a masked autoencoder over continuous tokens with a diffusion head (Li et al., arXiv 2406.11838).

The encoder sees the class (in `buffer` copies) and the known tokens, the decoder the whole grid with a mask token in
the unknown places; attention is bidirectional, so there is no cache. Parameter names are those of the published
checkpoints.

Tokens are scaled latents of an autoencoder (autoencoders/latents.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.common.checks import Count, Grid, Layers, Size
from bozzetto.errors import UsageError
from bozzetto.targets.denoiser import Denoiser, DenoiserConfig
from bozzetto.targets.layers import OnGrid

_EPS = 1e-6


@dataclass(frozen=True)
class MARConfig(OnGrid):
    """dim, depth, heads: of the encoder and of the decoder; token_dim: D; grid: tokens per side; classes: labels;
    buffer: copies of the class that the transformer sees; head_width, head_depth: the diffusion head."""

    dim: Size
    depth: Layers
    heads: Size
    head_width: Size
    head_depth: Layers
    token_dim: Size = 16
    grid: Grid = 16
    classes: Count = 1000
    buffer: Size = 64

    def __post_init__(self) -> None:
        if self.heads < 1 or self.dim % self.heads:
            raise UsageError(f"dim = {self.dim} with heads = {self.heads} is not allowed: heads must divide dim")

    @property
    def denoiser(self) -> DenoiserConfig:
        return DenoiserConfig(self.token_dim, 2 * self.token_dim, self.dim, self.head_width, self.head_depth)


# Published sizes: dim, depth (each of encoder and decoder), heads, head width, head depth.
SHAPES = {"B": (768, 12, 12, 1024, 6), "L": (1024, 16, 16, 1280, 8), "H": (1280, 20, 16, 1536, 12)}


class ViTBlock(nn.Module):
    """A pre-norm vision transformer block: attention over everything, fused qkv with biases; fc2(gelu(fc1 x))."""

    attn: Any
    mlp: Any

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)  # without dropout: with it, no fused kernel on the CPU
        x = x + self._drop(self.attn.proj(mixed.transpose(1, 2).flatten(2)))
        return x + self._drop(self.mlp.fc2(self._drop(F.gelu(self.mlp.fc1(self.norm2(x))))))


class MAR(nn.Module):
    """The network."""

    diffloss: Any

    def __init__(self, config: MARConfig, dropout: float = 0.0):
        super().__init__()
        self.config, dim = config, config.dim
        width = config.buffer + config.length
        self.class_emb = nn.Embedding(config.classes, dim)
        self.fake_latent = nn.Parameter(torch.zeros(1, dim))  # stands for no class
        self.z_proj = nn.Linear(config.token_dim, dim)
        self.z_proj_ln = nn.LayerNorm(dim, eps=_EPS)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, width, dim))
        self.encoder_blocks = nn.ModuleList(ViTBlock(dim, config.heads, dropout) for _ in range(config.depth))
        self.encoder_norm = nn.LayerNorm(dim, eps=_EPS)
        self.decoder_embed = nn.Linear(dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, width, dim))
        self.decoder_blocks = nn.ModuleList(ViTBlock(dim, config.heads, dropout) for _ in range(config.depth))
        self.decoder_norm = nn.LayerNorm(dim, eps=_EPS)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, config.length, dim))
        self._initialise()
        self.diffloss = nn.ModuleDict({"net": Denoiser(config.denoiser)})  # its published name

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.02)
        nn.init.normal_(self.class_emb.weight, std=0.02)

    def conditions_of(self, labels: Tensor) -> Tensor:
        """Class embeddings: labels int64 [B], `config.classes` for no class -> [B, dim]."""
        table = torch.cat([self.class_emb.weight, self.fake_latent])
        return table[labels]

    def features(self, labels: Tensor, tokens: Tensor, known: Tensor) -> Tensor:
        """Conditions of all places: labels int64 [B] (config.classes: unconditional); tokens float [B, N, D], read
        where known; known: int64 [B, K], places of the K known tokens, in any order -> [B, N, dim]."""
        c = self.config
        given = tokens.gather(1, known[..., None].expand(-1, -1, c.token_dim))
        classes = self.conditions_of(labels)[:, None].expand(-1, c.buffer, -1).to(given.dtype)
        x = torch.cat([classes, self.z_proj(given)], 1)
        place = torch.cat([torch.arange(c.buffer, device=known.device).expand(len(known), -1), known + c.buffer], 1)
        x = self.z_proj_ln(x + self.encoder_pos_embed_learned[0, place])
        for block in self.encoder_blocks:
            x = block(x)
        x = self.decoder_embed(self.encoder_norm(x))
        whole = self.mask_token.to(x.dtype).expand(len(x), c.buffer + c.length, -1)
        x = whole.scatter(1, place[..., None].expand_as(x), x) + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, c.buffer :] + self.diffusion_pos_embed_learned

    def predict(self, x: Tensor, times: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """The head: x [R, D] at times [R] in 0..999 under conditions [R, dim] -> noise, variance mix, [R, D] each."""
        noise, mix = self.diffloss.net(x, times, condition).chunk(2, -1)
        return noise, mix
