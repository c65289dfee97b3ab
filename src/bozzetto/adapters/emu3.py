"""Emu3 (Wang et al., arXiv 2409.18869) as transformers holds it: image tokens and an end of line are words of the
language model's vocabulary."""

from __future__ import annotations

from typing import Any

from transformers import Emu3ForConditionalGeneration

from bozzetto.adapters.lined import LinedTarget
from bozzetto.adapters.pictures import emu3_pictures
from bozzetto.adapters.prompted import Prompt
from bozzetto.adapters.source import Ask, Hosted, Source, check_multiple, fits_context, numbers
from bozzetto.checkpoints.load_settings import LoadSettings

_FACTOR, _AREA = 8, 720 * 720  # pixels per token and side, and of a picture
# Width to height, in the model's own area. Its authors publish the square and a processor that takes any ratio; these
# are the usual ones of photographs and screens.
RATIOS = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16")


class Emu3Target(LinedTarget):
    """model: transformers Emu3ForConditionalGeneration in evaluation mode, in the dtype to compute in; height, width:
    of the picture in tokens."""

    def __init__(self, model: Any, height: int, width: int):
        mapping = model.model.vocabulary_mapping
        codes = [mapping.img2bpe[i] for i in range(len(mapping.img2bpe))]
        super().__init__(model.model.text_model, model.lm_head.weight, codes, mapping.eol_token_id, height, width)


def load_emu3(source: Source, wanted: LoadSettings) -> Hosted:
    """Emu3 as transformers' conversion lays it out."""
    source.refuse(wanted, "tokenizer", "vqgan")
    if wanted.size:  # what can be said before weights are read
        check_multiple(wanted.size, _FACTOR)
    source.check(Emu3ForConditionalGeneration)
    processor, network = source.processor(), source.network(Emu3ForConditionalGeneration, wanted)
    own = source.sampling("emu3")
    sizes = tuple(_size(processor, ratio) for ratio in RATIOS)

    def sized(size: tuple[int, int]) -> Hosted:
        check_multiple(size, _FACTOR)
        columns, rows = (pixels // _FACTOR for pixels in size)
        target, look = Emu3Target(network, rows, columns), processor.image_processor
        fits_context(source, target, size)
        pictures = emu3_pictures(network, rows, columns, list(look.image_mean), list(look.image_std))
        ask = _grammar(processor, size)
        return Hosted(target, pictures, ask, own, processor.tokenizer, sizes, sized)

    return sized(wanted.size or sizes[0])


def _size(processor: Any, ratio: str) -> tuple[int, int]:
    """Width and height of a picture of this ratio, WIDTH:HEIGHT, in the model's own area."""
    area = getattr(processor, "image_area", _AREA)  # transformers 5.0 keeps it among a call's defaults
    height, width = processor.calculate_generate_size(ratio, area, _FACTOR)
    return width * _FACTOR, height * _FACTOR


def _grammar(processor: Any, size: tuple[int, int]) -> Ask:
    """The processor's prompts for pictures of this size: its ratio in tokens, and its area."""
    ratio, area = f"{size[0] // _FACTOR}:{size[1] // _FACTOR}", size[0] * size[1]

    def tokens(text: str) -> tuple[int, ...]:
        asked = {"return_for_image_generation": True, "ratio": ratio, "image_area": area}
        return tuple(numbers(processor(text=[text], return_tensors="pt", **asked)))

    return lambda text, negative: Prompt(tokens(text), tokens(negative))
