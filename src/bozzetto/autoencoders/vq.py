"""A VQ tokenizer: images to a grid of discrete codes and back, f = 8, with L2-normalised codes.

    image -> tiny encoder -> latent [32, h, w] -> `pre` -> 8-dim unit vector -> nearest code     (encode)
    code  -> `post` -> latent [32, h, w] -> tiny decoder (fine-tuned) -> image                     (decode)

Unit-norm low-dimensional codes follow ViT-VQGAN (Yu et al., arXiv 2110.04627), as LlamaGen's tokenizer does; the
codebook is fitted by exponential moving averages (van den Oord et al., arXiv 1711.00937) on the sphere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.autoencoders.decoder import SquareConfig
from bozzetto.autoencoders.tiny import DOWNSAMPLE, LATENT_CHANNELS, tiny_decoder, tiny_encoder
from bozzetto.common.checks import Layers, Pixels, Size
from bozzetto.errors import require

_GROUPS = 8  # of every group norm
_DEAD = 0.1  # average uses of a code that restarts


@dataclass(frozen=True)
class VQConfig(SquareConfig):
    """codes: codebook size V; code_dim: length of a code vector; width, pre_blocks, post_blocks: the two conv nets."""

    codes: Size = 4096
    code_dim: Size = 8
    width: Size = 160
    pre_blocks: Layers = 2
    post_blocks: Layers = 4
    image_size: Pixels = 128
    downsample: ClassVar[int] = DOWNSAMPLE

    def __post_init__(self) -> None:
        require(self.width >= 1 and self.width % _GROUPS == 0, "width", self.width, f"a multiple of {_GROUPS}")
        super().__post_init__()


class ResBlock(nn.Module):
    """norm-silu-conv twice, plus skip."""

    def __init__(self, width: int):
        super().__init__()
        halves = [(nn.GroupNorm(_GROUPS, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)) for _ in range(2)]
        self.net = nn.Sequential(*halves[0], *halves[1])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


def _stack(inner: int, width: int, blocks: int, outer: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inner, width, 3, padding=1),
        *[ResBlock(width) for _ in range(blocks)],
        nn.GroupNorm(_GROUPS, width),
        nn.SiLU(),
        nn.Conv2d(width, outer, 1),
    )


class VQTokenizer(nn.Module):
    """encode: [B, 3, H, W] in [0, 1] -> int64 [B, h*w]; decode: int64 [B, h*w] -> [B, 3, H, W] in [0, 1]."""

    encodes = True
    codebook: Tensor  # [V, code_dim], unit rows

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        self.encoder = tiny_encoder()
        self.pre = _stack(LATENT_CHANNELS, config.width, config.pre_blocks, config.code_dim)
        self.register_buffer("codebook", F.normalize(torch.randn(config.codes, config.code_dim), dim=-1))
        self.post = _stack(config.code_dim, config.width, config.post_blocks, LATENT_CHANNELS)
        self.decoder = tiny_decoder()

    def features(self, latent: Tensor) -> Tensor:
        """Latent [B, 32, h, w] -> unit vectors [B, h*w, code_dim], raster order."""
        return F.normalize(self.pre(latent).flatten(2).transpose(1, 2).float(), dim=-1)

    def nearest(self, unit: Tensor) -> Tensor:
        """Index of the closest code (largest cosine). [..., code_dim] -> int64 [...]."""
        flat = unit.reshape(-1, unit.shape[-1])
        return (flat @ self.codebook.t()).argmax(-1).view(unit.shape[:-1])

    def latent_of(self, codes: Tensor) -> Tensor:
        """Code vectors [B, h*w, code_dim] -> predicted latent [B, 32, h, w]."""
        side = int(codes.shape[1] ** 0.5)
        return self.post(codes.transpose(1, 2).reshape(len(codes), -1, side, side))

    def encode(self, images: Tensor) -> Tensor:
        return self.nearest(self.features(self.encoder(images)))

    def decode(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.latent_of(F.embedding(tokens, self.codebook))).clamp(0, 1)


class CodebookEMA:
    """Spherical k-means by moving averages: counts and sums decay, codes nobody uses restart at a data point."""

    def __init__(self, codebook: Tensor, decay: float = 0.99):
        self.codebook, self.decay = codebook, decay
        self.count = torch.zeros(len(codebook))  # all dead: the first update starts from data
        self.sum = codebook.clone()

    @torch.no_grad()
    def update(self, unit: Tensor, index: Tensor, generator: torch.Generator) -> int:
        """unit [M, d], index [M]; changes the codebook in place and returns how many codes restarted."""
        count = torch.bincount(index, minlength=len(self.codebook)).float()
        total = torch.zeros_like(self.sum).index_add_(0, index, unit)
        self.count.mul_(self.decay).add_(count, alpha=1 - self.decay)
        self.sum.mul_(self.decay).add_(total, alpha=1 - self.decay)
        dead = self.count < _DEAD
        revived = int(dead.sum())
        if revived:
            pick = torch.randint(len(unit), (revived,), generator=generator)
            self.sum[dead] = unit[pick]
            self.count[dead] = 1.0
        self.codebook.copy_(F.normalize(self.sum, dim=-1))
        return revived

    def state_dict(self) -> dict[str, Tensor]:
        return {"count": self.count, "sum": self.sum}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.count.copy_(state["count"])
        self.sum.copy_(state["sum"])
