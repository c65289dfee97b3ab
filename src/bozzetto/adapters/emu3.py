"""Emu3 (Wang et al., arXiv 2409.18869) as transformers holds it: image tokens and an end of line are words of the
language model's vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Emu3ForConditionalGeneration

from bozzetto.adapters.pictures import HostedPictures, PictureConfig
from bozzetto.adapters.prompted import PromptedCodes, codes_of, words_target
from bozzetto.adapters.source import Hosted, Source, check_multiple, fits_context, in_sizes, numbers, prompts_of
from bozzetto.checkpoints.load_settings import LoadSettings

_FACTOR, _AREA = 8, 720 * 720  # pixels per token and side, and of a picture
# Width to height, in the model's own area. Its authors publish the square and a processor that takes any ratio; these
# are the usual ones of photographs and screens.
RATIOS = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16")


def target(model: Any, rows: int, columns: int) -> PromptedCodes:
    """model: Emu3ForConditionalGeneration; rows, columns: of the picture in tokens."""
    end = model.model.vocabulary_mapping.eol_token_id
    return words_target(model.model.text_model, model.lm_head.weight, codes_of(model), rows, columns, end)


def load(source: Source, wanted: LoadSettings) -> Hosted:
    """Emu3 as transformers' conversion lays it out."""
    wanted.refuse(f"{source.name} has its own", "tokenizer", "vqgan")
    if wanted.size:  # what can be said before weights are read
        check_multiple(wanted.size, _FACTOR)
    source.check(Emu3ForConditionalGeneration)
    processor, network = source.processor(), source.network(Emu3ForConditionalGeneration, wanted)
    own = source.sampling()

    def made(size: tuple[int, int]) -> Hosted:
        columns, rows = (pixels // _FACTOR for pixels in size)
        drawn = target(network, rows, columns)
        fits_context(source, drawn, size)
        # The processor's prompts hold a picture's ratio in tokens, and its area.
        asked = {"ratio": f"{columns}:{rows}", "image_area": size[0] * size[1]}

        def tokens(text: str) -> list[int]:
            return numbers(processor(text=[text], return_tensors="pt", return_for_image_generation=True, **asked))

        pictures = _pictures(network, rows, columns, processor.image_processor)
        return Hosted(drawn, pictures, prompts_of(tokens), own, processor.tokenizer)

    return in_sizes(wanted, tuple(_size(processor, ratio) for ratio in RATIOS), made, _FACTOR)


def _size(processor: Any, ratio: str) -> tuple[int, int]:
    """Width and height of a picture of this ratio, WIDTH:HEIGHT, in the model's own area."""
    area = getattr(processor, "image_area", _AREA)  # transformers 5.0 keeps it among a call's defaults
    height, width = processor.calculate_generate_size(ratio, area, _FACTOR)
    return width * _FACTOR, height * _FACTOR


def _pictures(model: Any, rows: int, columns: int, look: Any) -> HostedPictures:
    """The model's own decoder. rows, columns: of codes; look: its image processor."""
    vq = model.model.vqmodel.float()
    shift, scale = (torch.tensor(list(part)).view(-1, 1, 1) for part in (look.image_mean, look.image_std))

    def pixels(codes: Tensor) -> Tensor:
        made = vq.decode(codes)
        return made * scale.to(made) + shift.to(made)

    config = PictureConfig(rows, columns, vq.spatial_scale_factor)
    return HostedPictures(config, vq.quantize.embedding.weight.detach(), pixels, lined=True)
