"""A causal model of continuous tokens: a LLaMA-style raster transformer with a flow head (NextStep-1's shape, small).

The body is LlamaGen's (class token, 2-D rotary positions) with a linear embedding of tokens and learned positions; the
head is a `Denoiser` that predicts the velocity x_1 - x_0 of the straight path x_t = t x_1 + (1 - t) x_0 from noise x_0
to token x_1 (Lipman et al., arXiv 2210.02747). How the head is sampled is the business of laws/schedules.py.

Tokens are scaled latents of an autoencoder (autoencoders/latents.py), mean 0 and deviation 1. Input index 0 is the
class, input index i >= 1 carries token i - 1; the condition at input index i is that of token i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bozzetto.common.checks import Count, Grid, Layers, Size
from bozzetto.targets.denoiser import Denoiser, DenoiserConfig
from bozzetto.targets.layers import OnGrid, RMSNorm, Rotating, small_maps
from bozzetto.targets.llamagen import LlamaGenConfig, TransformerBlock, class_embedding

TIME_SCALE = 1000.0  # the denoiser's times run from 0 to 1000


@dataclass(frozen=True)
class FlowConfig(OnGrid):
    """dim, layers, heads: the transformer; token_dim: D, numbers of a token; grid: tokens per side; classes: labels
    (one more row is the unconditional one); head_width, head_depth: the flow head."""

    dim: Size
    layers: Layers
    heads: Size
    token_dim: Size = 32
    grid: Grid = 16
    classes: Count = 1000
    head_width: Size = 384
    head_depth: Layers = 3
    ffn_multiple: Size = 128

    def __post_init__(self) -> None:
        _ = self.body  # raises UsageError for a shape that a transformer cannot have

    @property
    def body(self) -> LlamaGenConfig:
        """The transformer's config; it has no codebook."""
        return LlamaGenConfig(
            self.dim, self.layers, self.heads, 1, self.grid, self.classes, ffn_multiple=self.ffn_multiple
        )

    @property
    def denoiser(self) -> DenoiserConfig:
        return DenoiserConfig(self.token_dim, self.token_dim, self.dim, self.head_width, self.head_depth)


class FlowModel(Rotating):
    """The whole-sequence network, used for training and as the slow twin of the cached decoder."""

    layers: Any  # of TransformerBlock

    def __init__(self, config: FlowConfig, dropout: float = 0.0):
        super().__init__()
        self.config, body = config, config.body
        self.cls_embedding = class_embedding(body)
        self.token_embedding = nn.Linear(config.token_dim, config.dim)
        self.positions = nn.Parameter(torch.zeros(config.length, config.dim))
        self.drop = nn.Dropout(dropout)
        self.layers = nn.ModuleList(TransformerBlock(body, dropout) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, body.norm_eps)
        self.turn_by(body.rope)
        small_maps(self)
        nn.init.zeros_(self.token_embedding.bias)
        nn.init.normal_(self.positions, std=0.02)
        self.head = Denoiser(config.denoiser)

    def features(self, labels: Tensor, tokens: Tensor) -> Tensor:
        """Conditions of tokens 0..n: labels int64 [B] (config.classes: unconditional), tokens float [B, n, D], n < N ->
        [B, n + 1, dim]."""
        x = torch.cat([self.cls_embedding(labels), self.token_embedding(tokens)], dim=1)
        width = x.shape[1]
        x = self.drop(x + self.positions[:width])
        for layer in self.layers:
            x = layer(x, self.rope[None, :width, None])
        return self.norm(x)

    def velocity(self, x: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        """The head: x [R, D] at times [R] in [0, 1] under conditions [R, dim] -> E[x_1 - x_0], [R, D]."""
        return self.head(x, times * TIME_SCALE, condition)
