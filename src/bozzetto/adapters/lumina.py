"""Lumina-mGPT (arXiv 2408.02657): Chameleon's architecture with pictures of any size, which has words for it, and an
end of each line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import ChameleonForConditionalGeneration

from bozzetto.adapters.lined import LinedTarget
from bozzetto.adapters.prompted import Prompt
from bozzetto.adapters.source import Hosted, Source, fits_context
from bozzetto.adapters.vqgan import chameleon_pictures
from bozzetto.errors import UsageError
from bozzetto.load_settings import LoadSettings


class LuminaTarget(LinedTarget):
    """model: transformers ChameleonForConditionalGeneration in evaluation mode, with Lumina-mGPT's weights; end: the
    word that ends a line; grid: of the picture in tokens."""

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


def load_lumina(source: Source, wanted: LoadSettings) -> Hosted:
    """Lumina-mGPT."""
    source.check(ChameleonForConditionalGeneration)
    processor, network = source.processor(), source.network(ChameleonForConditionalGeneration, wanted)
    ask = LuminaPrompts(processor.tokenizer, source.name, wanted.image_size)
    target = LuminaTarget(network, ask.end, ask.grid)
    fits_context(target, ask.pixels)
    pictures = chameleon_pictures(source.folder, network, ask.grid, lined=True)
    return Hosted(target, pictures, ask, tokenizer=processor.tokenizer)
