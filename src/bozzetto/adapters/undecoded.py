"""Tokens that cannot become pictures here: they are drawn and written all the same, and shown as what they are."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from bozzetto.adapters.pictures import HostedPictures, LinedPictures, PictureConfig

_MARK = "tokens, not a picture"
_LINE = 14  # pixels of a line of text


class TokenPictures(HostedPictures):
    """Maps of tokens: a colour for each code, and a line that says what it is.

    codebook: the codes' vectors [V, d]; [0, d] where they are not known. missing: why there are no pictures ("": the
    maps are previews of them).
    """

    def __init__(self, config: PictureConfig, codebook: Tensor, missing: str):
        super().__init__(config, codebook, self._map)
        self.missing = missing
        self.mark = None if not missing else _marked(config.width, config.height)

    def _map(self, tokens: Tensor) -> Tensor:
        """int64 [B, N] -> [B, 3, H, W]."""
        codes, config = self.codes(tokens), self.config
        colour = torch.stack([(codes * step + 31) % 256 for step in (97, 57, 151)], 1) / 255.0
        pixels = colour.repeat_interleave(config.height // config.rows, 2)
        pixels = pixels.repeat_interleave(config.width // config.columns, 3)
        return (
            pixels
            if self.mark is None
            else torch.where(self.mark[0].to(pixels.device), self.mark[1].to(pixels), pixels)
        )


class LinedTokens(LinedPictures, TokenPictures):
    """Maps of tokens with an end of line after each row."""


def _marked(width: int, height: int) -> tuple[Tensor, Tensor]:
    """Where the line stands, bool [H, W], and its pixels float [H, W]."""
    image = Image.new("L", (width, height))
    ImageDraw.Draw(image).text((2, 1), _MARK, fill=255)
    where = torch.zeros(height, width, dtype=torch.bool)
    where[: min(_LINE, height)] = True
    return where, torch.from_numpy(np.asarray(image) / 255.0)
