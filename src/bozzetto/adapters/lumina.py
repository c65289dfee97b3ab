"""Lumina-mGPT (arXiv 2408.02657): Chameleon's architecture with pictures of any size, which has words for it, and an
end of each line."""

from __future__ import annotations

import re
from typing import Any

from bozzetto.adapters.chameleon_files import chameleon_files, chameleon_network, codes_of
from bozzetto.adapters.lined import LinedTarget
from bozzetto.adapters.prompted import Prompt
from bozzetto.adapters.source import Hosted, Source, check_multiple, fits_context, written
from bozzetto.adapters.vqgan import vqgan_pictures
from bozzetto.checkpoints.load_settings import LoadSettings
from bozzetto.common.hub import model_name
from bozzetto.errors import UsageError


class LuminaTarget(LinedTarget):
    """model: transformers ChameleonForConditionalGeneration in evaluation mode, with Lumina-mGPT's weights; end: the
    word that ends a line; rows, columns: of the picture in tokens."""

    def __init__(self, model: Any, end: int, rows: int, columns: int):
        super().__init__(model.model, model.lm_head.weight, codes_of(model), end, rows, columns)


_PIXELS, _CODES = 32, 2  # of one of Lumina-mGPT's cells, per side: its pixels and its codes
_MOST_RATIO = 4  # of the sides of a picture
_SIZES = (512, 768, 1024)  # what checkpoints are called by and trained for
_ELSEWHERE = (
    "give that of another Lumina-mGPT, which all have the same, with --tokenizer Alpha-VLLM/Lumina-mGPT-7B-768 "
    "(a folder or a name on the hub)"
)


class LuminaPrompts:
    """Lumina-mGPT's own grammar: the task in words, a separator, begin of image, and the picture's height and width in
    a word each. Without a prompt it begins at the begin of image. size: (width, height) of the picture in pixels.
    Raises UsageError."""

    def __init__(self, tokenizer: Any, size: tuple[int, int]):
        check_multiple(size, _PIXELS)
        self.tokenizer, self.size = tokenizer, size
        width, height = (self.word(f"<reserved{8800 + side // _PIXELS:05d}>") for side in size)
        self.begin, self.end = (self.word("<racm3:break>"), height, width), self.word("<reserved08799>")
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
        task = f"Generate an image of {written(self.size)} according to the following prompt:\n{text}"
        said = self.tokenizer.encode(task, add_special_tokens=False)
        return (self.tokenizer.bos_token_id, *said, self.separator, *self.begin)


def lumina_sizes(side: int) -> tuple[tuple[int, int], ...]:
    """(width, height) of the pictures that a checkpoint for squares of `side` pixels is trained on, the square first:
    those of no more cells than the square that have more when both sides grow by one, sides up to 4 to 1."""
    cells = (side // _PIXELS) ** 2
    pairs = ((w, h) for w in range(1, cells + 1) for h in range(max(1, cells // (w + 1)), cells // w + 1))
    allowed = [pair for pair in pairs if max(pair) <= _MOST_RATIO * min(pair)]
    allowed.sort(key=lambda pair: (abs(pair[0] - pair[1]), -pair[0] * pair[1]))
    return tuple((width * _PIXELS, height * _PIXELS) for width, height in allowed)


def trained_side(source: Source) -> int:
    """The side of the squares that the checkpoint is trained for, which only its name says. 0: unknown."""
    words = re.split(r"[-_.]", model_name(source.name))
    return next((side for side in _SIZES if str(side) in words), 0)


def load_lumina(source: Source, wanted: LoadSettings) -> Hosted:
    """Lumina-mGPT."""
    side = trained_side(source)
    if not (side or wanted.size):
        allowed = ", ".join(map(str, _SIZES))
        raise UsageError(
            f"{source.name}: its name does not say for which pictures it was trained: give --image-size "
            f"(Lumina-mGPT's are {allowed})"
        )
    tokenizer = source.tokenizer(wanted, _ELSEWHERE)
    LuminaPrompts(tokenizer, wanted.size or (side, side))  # what it refuses is refused before weights are read
    files = chameleon_files(source)
    pictured = vqgan_pictures(source, wanted, files, lined=True)
    network = chameleon_network(source, wanted, files)
    own, sizes = source.sampling("lumina-mgpt"), lumina_sizes(side) if side else ()

    def sized(size: tuple[int, int]) -> Hosted:
        ask = LuminaPrompts(tokenizer, size)
        columns, rows = (pixels // _PIXELS * _CODES for pixels in size)
        target = LuminaTarget(network, ask.end, rows, columns)
        fits_context(source, target, size)
        pictures = pictured(rows, columns, network.device)
        return Hosted(target, pictures, ask, own, tokenizer, sizes, sized)

    return sized(wanted.size or (side, side))
