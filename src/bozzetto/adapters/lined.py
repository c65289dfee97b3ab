"""Pictures whose token sequence holds an end-of-line word after each row, as Emu3 and Lumina-mGPT write them.

The grid decides where that word stands and not the model: here it is code V of V + 1, certain where a row ends and
impossible elsewhere, so that every drafter has it for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bozzetto.adapters.prompted import PromptedCodes, Shape, gathered

NEVER = -1e9  # a logit that no temperature makes possible; finite, so that guidance can subtract two of them


class LinedTarget(PromptedCodes):
    """body: a transformers decoder in evaluation mode; head: rows of its vocabulary; codes: words of the image tokens;
    end: the word that ends a line; height, width: of the picture in tokens."""

    @torch.no_grad()
    def __init__(self, body: Any, head: Tensor, codes: Sequence[int], end: int, height: int, width: int):
        self.numbers = [*codes, end]
        rows, text = gathered(self.numbers, body.embed_tokens.weight), body.config
        shape = Shape(len(self.numbers), height * (width + 1), text.hidden_size)
        super().__init__(body, text.num_hidden_layers, rows, shape, text.max_position_embeddings)
        self.word_rows, self.width, self.head = body.embed_tokens, width, gathered(self.numbers, head)

    def words(self, tokens: Tensor) -> Tensor:
        return self.word_rows(tokens)

    def logits(self, hidden: Tensor, position: Tensor) -> Tensor:
        free = F.linear(hidden, self.head[:-1]).float()
        ends = (position % (self.width + 1) == self.width)[..., None]  # the law of token i is at input i
        line = torch.where(ends, 0.0, NEVER).to(free.dtype)
        return torch.cat([free.masked_fill(ends, NEVER), line], -1)


def without_line_ends(tokens: Tensor, width: int) -> Tensor:
    """int64 [B, height * (width + 1)] -> codes int64 [B, height, width]."""
    return tokens.unflatten(1, (-1, width + 1))[..., :-1]
