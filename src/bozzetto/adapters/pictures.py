"""From image tokens of transformers models to pixels: each model's own decoder, in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bozzetto.adapters.lined import without_line_ends
from bozzetto.common.images import Origin, to_picture


@dataclass(frozen=True)
class PictureConfig:
    """rows, columns: of codes; width, height: of the picture in pixels."""

    rows: int
    columns: int
    width: int
    height: int

    @classmethod
    def of(cls, rows: int, columns: int, scale: int) -> PictureConfig:
        """scale: pixels per code and side."""
        return cls(rows, columns, columns * scale, rows * scale)


class HostedPictures:
    """What a pipeline asks of a tokenizer. codebook: float [V', d], the codes that stand for something (V' is V, or
    one less where the last token ends a line); to_pixels: tokens int64 [B, N] -> float [B, 3, H, W]. missing: why there
    are tokens and no pictures ("": there are)."""

    missing = ""

    def __init__(self, config: PictureConfig, codebook: Tensor, to_pixels: Callable[[Tensor], Tensor]):
        self.config, self.codebook, self.to_pixels = config, codebook, to_pixels

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """int64 [B, N] -> [B, 3, H, W] in [0, 1]."""
        return self.to_pixels(tokens).float().clamp(0, 1)

    def picture(self, tokens: Tensor, origin: Origin | None) -> Image.Image:
        """Tokens int64 [N] of an image -> its picture. origin: what it was drawn for, where that is known."""
        return to_picture(self.decode(tokens[None])[0])

    def codes(self, tokens: Tensor) -> Tensor:
        """int64 [B, N] -> the codes in their places, int64 [B, rows, columns]."""
        return tokens.unflatten(1, (self.config.rows, self.config.columns))

    def codes_drawn(self, count: int) -> int:
        """How many codes the first `count` tokens hold."""
        return count


class LinedPictures(HostedPictures):
    """Pictures whose tokens hold an end of line after each row."""

    def codes(self, tokens: Tensor) -> Tensor:
        return without_line_ends(tokens, self.config.columns)

    def codes_drawn(self, count: int) -> int:
        return count - count // (self.config.columns + 1)


def janus_pictures(model: Any, grid: int) -> HostedPictures:
    """model: transformers JanusForConditionalGeneration."""
    vq = model.model.vqmodel.float()
    scale = 2 ** (len(model.config.vq_config.channel_multiplier) - 1)

    def pixels(tokens: Tensor) -> Tensor:
        return (vq.decode(tokens) + 1) / 2

    codebook = F.normalize(vq.quantize.embedding.weight.detach(), dim=-1)
    return HostedPictures(PictureConfig.of(grid, grid, scale), codebook, pixels)


def emu3_pictures(model: Any, rows: int, columns: int, mean: list[float], std: list[float]) -> HostedPictures:
    """model: transformers Emu3ForConditionalGeneration; rows, columns: of codes; mean, std: of its image processor."""
    vq = model.model.vqmodel.float()
    shift, scale = (torch.tensor(part).view(-1, 1, 1) for part in (mean, std))

    def pixels(tokens: Tensor) -> Tensor:
        made = vq.decode(without_line_ends(tokens, columns))
        return made * scale.to(made) + shift.to(made)

    codebook = vq.quantize.embedding.weight.detach()
    return LinedPictures(PictureConfig.of(rows, columns, vq.spatial_scale_factor), codebook, pixels)
