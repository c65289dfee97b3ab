"""Models of Chameleon's architecture (arXiv 2405.09818) as transformers holds them: Anole (arXiv 2407.06135),
Lumina-mGPT (arXiv 2408.02657).

Image tokens are words of the one vocabulary. transformers hides them (its forward masks their logits), so the decoder
and the rows of the head are called here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bozzetto.adapters.prompted import PromptedCodes, Shape, gathered


class ChameleonTarget(PromptedCodes):
    """model: transformers ChameleonForConditionalGeneration in evaluation mode, in the dtype to compute in; grid: of
    the picture in tokens."""

    @torch.no_grad()
    def __init__(self, model: Any, grid: int):
        body, codes = model.model, model.model.vocabulary_mapping.img2bpe
        self.numbers = [codes[i] for i in range(len(codes))]
        rows = gathered(self.numbers, body.embed_tokens.weight)
        shape = Shape(len(self.numbers), grid * grid, body.config.hidden_size)
        super().__init__(body, body.config.num_hidden_layers, rows, shape, body.config.max_position_embeddings)
        self.word_rows, self.head = body.embed_tokens, gathered(self.numbers, model.lm_head.weight)

    def words(self, tokens: Tensor) -> Tensor:
        return self.word_rows(tokens)

    def logits(self, hidden: Tensor, position: Tensor) -> Tensor:
        return F.linear(hidden, self.head).float()
