"""Models of Chameleon's architecture (arXiv 2405.09818) as transformers holds them, such as Anole (arXiv 2407.06135).

Image tokens are words of the one vocabulary. transformers hides them (its forward masks their logits), so the decoder
and the rows of the head are called here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bozzetto.adapters.chameleon_files import chameleon_files, chameleon_network, codes_of
from bozzetto.adapters.lumina import load_lumina
from bozzetto.adapters.prompted import Prompt, PromptedCodes, Shape, gathered
from bozzetto.adapters.source import Hosted, Source, fixed_size, numbers
from bozzetto.adapters.vqgan import vqgan_pictures
from bozzetto.checkpoints.load_settings import LoadSettings
from bozzetto.checkpoints.published import family_of
from bozzetto.common.images import size_of


class ChameleonTarget(PromptedCodes):
    """model: transformers ChameleonForConditionalGeneration in evaluation mode, in the dtype to compute in; grid: of
    the picture in tokens."""

    @torch.no_grad()
    def __init__(self, model: Any, grid: int):
        body, self.numbers = model.model, codes_of(model)
        rows = gathered(self.numbers, body.embed_tokens.weight)
        shape = Shape(len(self.numbers), grid * grid, body.config.hidden_size)
        super().__init__(body, body.config.num_hidden_layers, rows, shape, body.config.max_position_embeddings)
        self.word_rows, self.head = body.embed_tokens, gathered(self.numbers, model.lm_head.weight)

    def words(self, tokens: Tensor) -> Tensor:
        return self.word_rows(tokens)

    def logits(self, hidden: Tensor, position: Tensor) -> Tensor:
        return F.linear(hidden, self.head).float()


def load_chameleon(source: Source, wanted: LoadSettings) -> Hosted:
    """Chameleon's architecture as transformers' conversion lays it out; Lumina-mGPT says what it is."""
    if family_of(source.config) == "lumina-mgpt":
        return load_lumina(source, wanted)
    source.refuse(wanted, "tokenizer")
    processor, files = source.processor(), chameleon_files(source)
    pictured = vqgan_pictures(source, wanted, files)
    network = chameleon_network(source, wanted, files)
    grid = math.isqrt(processor.image_seq_length)
    target = ChameleonTarget(network, grid)
    pictures = pictured(grid, grid, network.device)
    fixed_size(source, wanted, size_of(pictures.config))
    begin, first = processor.image_start_token_id, processor.tokenizer.bos_token_id

    def tokens(text: str) -> tuple[int, ...]:
        return (*numbers(processor(text=text, return_tensors="pt")), begin)

    def ask(text: str, negative: str) -> Prompt:
        return Prompt(tokens(text), tokens(negative) if negative else (first, begin))

    return Hosted(target, pictures, ask, source.sampling("chameleon"), processor.tokenizer)
