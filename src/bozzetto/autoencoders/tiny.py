"""The tiny autoencoder: a 1.3 M parameter encoder and decoder for the FLUX.2 latent space.

Architecture after TAESD by Ollin Boer Bohan (MIT licence), written here from the layout of its published weights.
Images are float tensors in [0, 1], shape [B, 3, H, W]; latents are [B, 32, H/8, W/8].
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from bozzetto.errors import UsageError

LATENT_CHANNELS = 32
DOWNSAMPLE = 8
_WIDTH = 64


class Block(nn.Module):
    """conv-relu-conv-relu-conv plus skip; at the lowest resolution a GroupNorm bottleneck comes first."""

    def __init__(self, pooled: bool = False):
        super().__init__()
        first, *others = (nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1) for _ in range(3))
        self.conv = nn.Sequential(first, *[layer for conv in others for layer in (nn.ReLU(), conv)])
        self.pool = None
        if pooled:
            self.pool = nn.Sequential(
                nn.Conv2d(_WIDTH, 4 * _WIDTH, 1, bias=False),
                nn.GroupNorm(4, 4 * _WIDTH),
                nn.ReLU(),
                nn.Conv2d(4 * _WIDTH, _WIDTH, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class Clamp(nn.Module):
    """Soft clamp of latents to (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return 3.0 * torch.tanh(x / 3.0)


def _down() -> nn.Conv2d:
    return nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1, stride=2, bias=False)


def _up() -> list[nn.Module]:
    return [nn.Upsample(scale_factor=2), nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1, bias=False)]


def tiny_encoder() -> nn.Sequential:
    """Image in [0, 1] [B, 3, H, W] -> latent [B, 32, H/8, W/8]."""
    return nn.Sequential(
        nn.Conv2d(3, _WIDTH, 3, padding=1),
        Block(),
        *[m for _ in range(2) for m in (_down(), Block(), Block(), Block())],
        _down(),
        *[Block(pooled=True) for _ in range(3)],
        nn.Conv2d(_WIDTH, LATENT_CHANNELS, 3, padding=1),
    )


def tiny_decoder() -> nn.Sequential:
    """Latent [B, 32, h, w] -> image, nominally in [0, 1], [B, 3, 8h, 8w]."""
    return nn.Sequential(
        Clamp(),
        nn.Conv2d(LATENT_CHANNELS, _WIDTH, 3, padding=1),
        nn.ReLU(),
        *[Block(pooled=True) for _ in range(3)],
        *_up(),
        *[Block() for _ in range(3)],
        *_up(),
        *[Block() for _ in range(3)],
        *_up(),
        Block(),
        nn.Conv2d(_WIDTH, 3, 3, padding=1),
    )


def load_tiny(folder: str | Path) -> tuple[nn.Sequential, nn.Sequential]:
    """Read `taef2_encoder.pth` and `taef2_decoder.pth` from `folder` (strictly, as float32).

    Raises UsageError when either is missing or cannot be read, or a key or shape differs.
    """
    folder = Path(folder)
    pair = []
    for name, make in (("encoder", tiny_encoder), ("decoder", tiny_decoder)):
        path = folder / f"taef2_{name}.pth"
        if not path.is_file():
            raise UsageError(f"tiny autoencoder weights not found: {path}")
        module = make()
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            module.load_state_dict({k: v.float() for k, v in state.items()}, strict=True)
        except Exception as error:  # torch raises several unrelated types for a broken or unsafe pickle
            raise UsageError(f"{path}: not the tiny autoencoder's {name}: {error}") from error
        pair.append(module)
    return pair[0], pair[1]
