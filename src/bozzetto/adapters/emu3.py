"""Emu3 (Wang et al., arXiv 2409.18869) as transformers holds it: image tokens and an end of line are words of the
language model's vocabulary."""

from __future__ import annotations

import math
from typing import Any

from transformers import Emu3ForConditionalGeneration

from bozzetto.adapters.lined import LinedTarget
from bozzetto.adapters.pictures import emu3_pictures
from bozzetto.adapters.prompted import Prompt
from bozzetto.adapters.source import Hosted, Source, fits_context, numbers
from bozzetto.errors import UsageError
from bozzetto.load_settings import LoadSettings

_FACTOR = 8  # pixels per token and side


class Emu3Target(LinedTarget):
    """model: transformers Emu3ForConditionalGeneration in evaluation mode, in the dtype to compute in; height, width:
    of the picture in tokens."""

    def __init__(self, model: Any, height: int, width: int):
        mapping = model.model.vocabulary_mapping
        codes = [mapping.img2bpe[i] for i in range(len(mapping.img2bpe))]
        super().__init__(model.model.text_model, model.lm_head.weight, codes, mapping.eol_token_id, height, width)


def load_emu3(source: Source, wanted: LoadSettings) -> Hosted:
    """Emu3 as transformers' conversion lays it out."""
    source.check(Emu3ForConditionalGeneration)
    processor, network = source.processor(), source.network(Emu3ForConditionalGeneration, wanted)
    image_size = wanted.image_size
    area = (image_size or math.isqrt(processor.image_area)) ** 2
    height, width = processor.calculate_generate_size("1:1", area, _FACTOR)
    if height != width or height < 1 or (image_size and height * _FACTOR != image_size):
        raise UsageError(f"image_size = {image_size} is not allowed: a multiple of {_FACTOR}")
    target, own = Emu3Target(network, height, width), processor.image_processor
    fits_context(target, height * _FACTOR)
    pictures = emu3_pictures(network, width, list(own.image_mean), list(own.image_std))

    def tokens(text: str) -> tuple[int, ...]:
        asked = {"return_for_image_generation": True, "ratio": "1:1", "image_area": area}
        return tuple(numbers(processor(text=[text], return_tensors="pt", **asked)))

    def ask(text: str, negative: str) -> Prompt:
        return Prompt(tokens(text), tokens(negative))

    return Hosted(target, pictures, ask, tokenizer=processor.tokenizer)
