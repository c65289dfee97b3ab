"""From continuous tokens to pixels: unscale, fold into the grid, decode.

A token is a scaled latent, token = (latent - shift) / scale. For the tiny autoencoder scale and shift are measured per
channel on training pictures; published MAR models multiply by one constant (scale = 1 / 0.2325, shift = 0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bozzetto.autoencoders.decoder import SquareConfig
from bozzetto.autoencoders.tiny import DOWNSAMPLE, LATENT_CHANNELS, tiny_decoder
from bozzetto.common.checks import Pixels, Size

TINY, KL16 = "latent-tiny", "latent-kl16"  # kinds of decoder


@dataclass(frozen=True)
class LatentConfig(SquareConfig):
    """image_size: pixels a side; token_dim: D, channels of the latent; downsample: pixels per token and side."""

    image_size: Pixels = 128
    token_dim: Size = LATENT_CHANNELS
    downsample: Size = DOWNSAMPLE


class LatentDecoder(nn.Module):
    """decode: float [B, N, D] tokens in raster order -> [B, 3, H, W] in [0, 1]. decoder: latents [B, D, h, w] ->
    pixels."""

    encodes = False
    scale: Tensor
    shift: Tensor

    def __init__(self, config: LatentConfig, decoder: nn.Module):
        super().__init__()
        self.config, self.decoder = config, decoder
        self.register_buffer("scale", torch.ones(config.token_dim))
        self.register_buffer("shift", torch.zeros(config.token_dim))

    def decode(self, tokens: Tensor) -> Tensor:
        side = math.isqrt(tokens.shape[1])
        latent = (tokens * self.scale + self.shift).transpose(1, 2).unflatten(2, (side, side))
        return self.decoder(latent).clamp(0, 1)


def tiny_latents(image_size: int = 128) -> LatentDecoder:
    """The tiny autoencoder's decoder, its weights yet to be loaded."""
    return LatentDecoder(LatentConfig(image_size), tiny_decoder())
