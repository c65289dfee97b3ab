"""GLM-Image's autoregressive stage as transformers holds it (GlmImageForConditionalGeneration).

Image tokens are the first words of the vocabulary and have a head of their own. A picture is two grids, one after the
other: a preview of about 16 x 16 tokens, then the picture itself, 32 pixels per token and side. Positions have three
axes: of a grid that begins at position p, the token in row y and column x lies at (p, p + y, p + x), and the next grid
begins at p plus the longer side. What ends the picture is not drawn: it ends when it is full.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bozzetto.adapters.prompted import PromptedCodes, Shape

FACTOR = 32  # pixels per token and side


class GlmImageTarget(PromptedCodes):
    """model: transformers GlmImageForConditionalGeneration in evaluation mode, in the dtype to compute in; preview,
    grid: rows and columns of the two grids."""

    @torch.no_grad()
    def __init__(self, model: Any, preview: tuple[int, int], grid: tuple[int, int]):
        body, codes = model.model.language_model, model.config.vq_config.num_embeddings
        self.skipped = math.prod(preview)  # tokens before those of the picture
        text, length = body.config, self.skipped + math.prod(grid)
        shape, rows = Shape(codes, length, text.hidden_size), body.embed_tokens.weight.detach()
        super().__init__(body, text.num_hidden_layers, rows[:codes], shape, text.max_position_embeddings)
        self.word_rows, self.head, self.numbers = (
            body.embed_tokens,
            model.lm_head.weight.detach()[:codes],
            [*range(codes)],
        )
        self.offsets = _offsets(preview, grid).to(self.device)

    def words(self, tokens: Tensor) -> Tensor:
        return self.word_rows(tokens)

    def places(self, lead: Tensor, number: Tensor) -> Tensor:
        """int64 [3, R, W]: along time, rows and columns."""
        at = number.clamp(0, self.length)  # of slots past the end of the picture nothing is read
        return lead[:, None] + torch.where(number > 0, self.offsets[:, at], number)

    def logits(self, hidden: Tensor, position: Tensor) -> Tensor:
        return F.linear(hidden, self.head).float()


def _offsets(*grids: tuple[int, int]) -> Tensor:
    """Positions of inputs 0, 1, ... after that of input 0, int64 [3, 1 + N]."""
    parts, begin = [torch.zeros(3, 1, dtype=torch.int64)], 1
    for rows, columns in grids:
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        parts.append(begin + torch.stack([torch.zeros_like(x), y, x]).flatten(1))
        begin += max(rows, columns)
    return torch.cat(parts, 1)
