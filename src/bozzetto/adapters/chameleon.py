"""Models of Chameleon's architecture (arXiv 2405.09818) as transformers holds them: Anole (arXiv 2407.06135), and
Lumina-mGPT (arXiv 2408.02657), whose pictures are of any size and have words for it.

Image tokens are words of the one vocabulary. transformers hides them (its forward masks their logits), so the decoder
and the rows of the head are called here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bozzetto.adapters.lined import LinedTarget
from bozzetto.adapters.prompted import Prompt, PromptedCodes, Shape, gathered
from bozzetto.errors import UsageError


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


class LuminaTarget(LinedTarget):
    """model: as above, with Lumina-mGPT's weights; end: the word that ends a line; grid: of the picture in tokens."""

    def __init__(self, model: Any, end: int, grid: int):
        super().__init__(model.model, model.lm_head.weight, codes_of(model), end, grid, grid)


def codes_of(model: Any) -> list[int]:
    """Words of the image tokens, in the order of the codebook."""
    codes = model.model.vocabulary_mapping.img2bpe
    return [codes[i] for i in range(len(codes))]


_PIXELS = 32  # one of Lumina-mGPT's grids, per side: two tokens
_SIZES = ("512", "768", "1024")


class LuminaPrompts:
    """Lumina-mGPT's own grammar: the task in words, a separator, begin of image, and the picture's size in two words.
    Without a prompt it begins at the begin of image. pixels: per side of the picture. Raises UsageError."""

    def __init__(self, tokenizer: Any, model: str, pixels: int):
        self.tokenizer = tokenizer
        asked = pixels or int(next((size for size in _SIZES if size in Path(model).name), "768"))
        if asked % _PIXELS or asked < _PIXELS:
            raise UsageError(f"image_size = {asked} is not allowed: a multiple of {_PIXELS}")
        self.pixels, self.grid = asked, asked // (_PIXELS // 2)
        size = self.word(f"<reserved{8800 + asked // _PIXELS:05d}>")
        self.begin, self.end = (self.word("<racm3:break>"), size, size), self.word("<reserved08799>")
        self.separator = self.word("<reserved08706>")

    def word(self, name: str) -> int:
        """The number of a word that has to be there."""
        found = self.tokenizer.convert_tokens_to_ids(name)
        if found is None or found == self.tokenizer.unk_token_id:
            raise UsageError(f"the tokenizer has no word {name!r}: Lumina-mGPT's own tokenizer files are needed")
        return int(found)

    def __call__(self, text: str, negative: str) -> Prompt:
        return Prompt(self.tokens(text), self.tokens(negative) if negative else self.begin)

    def tokens(self, text: str) -> tuple[int, ...]:
        """Words of the whole prompt."""
        task = f"Generate an image of {self.pixels}x{self.pixels} according to the following prompt:\n{text}"
        said = self.tokenizer.encode(task, add_special_tokens=False)
        return (self.tokenizer.bos_token_id, *said, self.separator, *self.begin)
