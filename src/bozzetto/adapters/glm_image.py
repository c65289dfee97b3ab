"""GLM-Image's autoregressive stage as transformers holds it (GlmImageForConditionalGeneration).

Image tokens are the first words of the vocabulary and have a head of their own. A picture is two grids, one after the
other: a preview of about 16 x 16 tokens, then the picture itself, 32 pixels per token and side. Positions have three
axes: of a grid that begins at position p, the token in row y and column x lies at (p, p + y, p + x), and the next grid
begins at p plus the longer side. What ends the picture is not drawn: it ends when it is full.

A second stage makes pixels of the picture's tokens, by diffusion (adapters/glm_pictures.py).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GlmImageForConditionalGeneration, GlmImageProcessor

from bozzetto.adapters.glm_pictures import FACTOR, glm_pictures, second_stage
from bozzetto.adapters.prompted import Prompt, PromptedCodes, Shape
from bozzetto.adapters.source import Hosted, Source, check_multiple, fits_context, numbers
from bozzetto.checkpoints.load_settings import LoadSettings

PROCESSOR = "processor"  # a folder of the published pipeline, beside that of the first stage
SIZES = ((1024, 1024), (1152, 768), (768, 1152), (1280, 1280))


class GlmImageDrawing(GlmImageForConditionalGeneration):
    """Without the tower that looks at pictures: a billion of the published weights."""

    _keys_to_ignore_on_load_unexpected = (r"^model\.visual\.",)

    def __init__(self, config: Any):
        super().__init__(config)
        del self.model.visual


class GlmImageTarget(PromptedCodes):
    """model: transformers GlmImageForConditionalGeneration (GlmImageDrawing will do) in evaluation mode, in the dtype
    to compute in; preview, grid: rows and columns of the two grids."""

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


def load_glm_image(source: Source, wanted: LoadSettings) -> Hosted:
    """GLM-Image's first stage, and its second where the whole pipeline's folder was asked for."""
    source.refuse(wanted, "tokenizer", "vqgan")
    if wanted.size:  # before weights are read
        check_multiple(wanted.size, FACTOR)
    source.check(GlmImageDrawing)
    beside = source.folder.parent / PROCESSOR
    lies = source if (source.folder / "tokenizer_config.json").is_file() else replace(source, folder=beside)
    processor = lies.read("processor", GlmImageProcessor.from_pretrained)
    besides = () if source.whole or lies is source else (beside / "tokenizer.json",)
    network = source.network(GlmImageDrawing, wanted)
    stage, own = second_stage(source, wanted), source.sampling("glm-image")
    if own.top_k >= network.config.vq_config.num_embeddings:  # as published: all words of the head
        own = replace(own, top_k=0)

    def sized(size: tuple[int, int]) -> Hosted:
        check_multiple(size, FACTOR)
        columns, rows = (pixels // FACTOR for pixels in size)

        def prepared(text: str) -> Any:
            said = [{"role": "user", "content": [{"type": "text", "text": text}]}]
            whole = processor.apply_chat_template(said, tokenize=False)
            return processor(text=[whole], target_h=size[1], target_w=size[0], return_tensors="pt")

        _, preview = prepared("")["image_grid_thw"].tolist()
        target = GlmImageTarget(network, (preview[1], preview[2]), (rows, columns))
        fits_context(source, target, size)

        def ask(text: str, negative: str) -> Prompt:
            return Prompt(tuple(numbers(prepared(text))), tuple(numbers(prepared(negative))))

        pictures = glm_pictures(network, stage, target.skipped, rows, columns)
        return Hosted(target, pictures, ask, own, processor.tokenizer, SIZES, sized, besides)

    return sized(wanted.size or SIZES[0])
