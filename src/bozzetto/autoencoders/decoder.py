"""What autoencoders share: the shape of their pictures; of published convolutional ones (VQGAN, Esser et al., arXiv
2012.09841) their half that draws, and how their states are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.errors import require

GROUPS = 32  # of every group norm


class SquareConfig:
    """What configs of tokenizers of square pictures say as all do, of their `image_size` and `downsample`, pixels per
    token and side. Raises UsageError for pictures that are not of whole tokens."""

    def __post_init__(self: Any) -> None:
        fine = self.image_size >= 1 and self.image_size % self.downsample == 0
        require(fine, "image_size", self.image_size, f"a multiple of {self.downsample}")

    @property
    def grid(self: Any) -> int:
        """Tokens a side."""
        return int(self.image_size // self.downsample)

    @property
    def shape(self: Any) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.grid, self.grid

    @property
    def size(self: Any) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.image_size, self.image_size


class PublishedDecoder(nn.Module):
    """The part of a whole autoencoder that draws, latents [B, D, h, w] -> pixels [B, 3, H, W] in [0, 1] where it is
    trained; with a codebook [V, D], of codes int64 [B, h, w]. spatial: norms are told the latents, too."""

    codebook: Tensor | None

    def __init__(self, whole: Any, codebook: Tensor | None = None, spatial: bool = False):
        super().__init__()
        self.decoder, self.post_quant_conv, self.spatial = whole.decoder, whole.post_quant_conv, spatial
        self.register_buffer("codebook", codebook)

    def forward(self, x: Tensor) -> Tensor:
        if self.codebook is not None:
            x = F.embedding(x, self.codebook).permute(0, 3, 1, 2)
        return (self.decoder(self.post_quant_conv(x), *([x] if self.spatial else [])) + 1) / 2


def renamed(key: str, names: Sequence[tuple[str, str]], back: bool = False) -> str:
    """A parameter's name with the first part of each pair replaced by the second (back: the other way round)."""
    for theirs, ours in names:
        key = key.replace(ours, theirs) if back else key.replace(theirs, ours)
    return key


def renamed_whole(key: str, names: Sequence[tuple[str, str]]) -> str | None:
    """A parameter's name by the first (pattern of all of it, replacement) that fits; None where none does."""
    for theirs, ours in names:
        if match := re.fullmatch(theirs, key):
            return match.expand(ours)
    return None


def numbered(state: Iterable[str], before: str) -> int:
    """How many different numbers follow `before` in keys."""
    return len({key[len(before) :].split(".")[0] for key in state if key.startswith(before)})


def levels_of(state: Mapping[str, Tensor], before: str, block: str = "block") -> tuple[list[int], int]:
    """Channels of each level, and residual blocks of one, by the shapes of `before`N.`block`.M.conv1.weight. Raises
    KeyError or IndexError for a state that lacks them."""
    levels = range(numbered(state, before))
    widths = [state[f"{before}{n}.{block}.0.conv1.weight"].shape[0] for n in levels]
    return widths, numbered(state, f"{before}0.{block}.")
