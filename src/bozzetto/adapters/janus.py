"""Janus and Janus-Pro (Wu et al., arXiv 2410.13848; Chen et al., arXiv 2501.17811) as transformers holds them.

Image tokens have an embedding of their own (a codebook entry through an aligner) and a head of their own; the decoder
between the two is the language model. Without a prompt: the same prompt with all tokens but the first and the
begin-of-image one replaced by padding, as the model's own image loop does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bozzetto.adapters.prompted import Prompt, PromptedCodes, Shape


class JanusTarget(PromptedCodes):
    """model: transformers JanusForConditionalGeneration in evaluation mode, in the dtype to compute in."""

    @torch.no_grad()
    def __init__(self, model: Any):
        body, self.head = model.model.language_model, model.model.generation_head
        text, vocab = body.config, model.config.vq_config.num_embeddings
        length = model.config.vision_config.num_image_tokens
        table = torch.arange(vocab, device=body.device)[None]
        rows = model.prepare_embeddings_for_image_generation(table)[0]
        shape = Shape(vocab, length, text.hidden_size)
        super().__init__(body, text.num_hidden_layers, rows, shape, text.max_position_embeddings)
        self.word_rows = body.get_input_embeddings()

    def words(self, tokens: Tensor) -> Tensor:
        return self.word_rows(tokens)

    def logits(self, hidden: Tensor, position: Tensor) -> Tensor:
        return self.head(hidden).float()


def janus_prompt(tokens: list[int], begin_text: int, begin_image: int, padding: int) -> Prompt:
    """tokens: of the prompt, the begin-of-image one last."""
    kept = (begin_text, begin_image)
    return Prompt(tuple(tokens), tuple(token if token in kept else padding for token in tokens))
