"""GLM-Image as transformers and diffusers hold it (GlmImageForConditionalGeneration, GlmImagePipeline).

The autoregressive stage: image tokens are the first words of the vocabulary and have a head of their own. A picture is
two grids, one after the other: a preview of about 16 x 16 tokens, then the picture itself, 32 pixels per token and
side. Positions have three axes: of a grid that begins at position p, the token in row y and column x lies at (p, p + y,
p + x), and the next grid begins at p plus the longer side. What ends the picture is not drawn: it ends when it is full.

The second stage makes pixels of the picture's tokens, by diffusion. It reads the prompt too (its words in quotes,
letter by letter) and starts from noise, which here is a function of (seed, image), so that it needs to know what a
picture was drawn for. Without it there are tokens only.
"""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import GlmImageForConditionalGeneration, GlmImageProcessor

from bozzetto.adapters.pictures import HostedPictures, PictureConfig
from bozzetto.adapters.prompted import PromptedCodes
from bozzetto.adapters.source import (
    Hosted,
    Source,
    check_counts,
    check_multiple,
    check_types,
    check_weights,
    fits_context,
    in_sizes,
    numbers,
    prompts_of,
    without,
)
from bozzetto.checkpoints.folders import CONFIG, read_config
from bozzetto.checkpoints.load_settings import LoadSettings
from bozzetto.checkpoints.weights import read_header
from bozzetto.common.images import Origin
from bozzetto.errors import UsageError, one_line
from bozzetto.laws.noise import STREAM_PICTURE, fold, image_keys, normal

PROCESSOR = "processor"  # a folder of the published pipeline, beside that of the first stage
SIZES = ((1024, 1024), (1152, 768), (768, 1152), (1280, 1280))
_FACTOR = 32  # pixels per token and side
_TWICE = 2  # the second stage has a token for each 16 pixels
_TYPES = ("F16", "BF16", "F32")  # diffusers 0.42 leaves float64 as it is beside others
GlmImageDrawing = without(GlmImageForConditionalGeneration, "visual")
_PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")


def target(model: Any, preview: tuple[int, int], grid: tuple[int, int]) -> PromptedCodes:
    """model: GlmImageForConditionalGeneration (GlmImageDrawing will do); preview, grid: rows and columns of the two
    grids."""
    body, codes = model.model.language_model, model.config.vq_config.num_embeddings
    embedding, head = body.embed_tokens.weight.detach()[:codes], model.lm_head.weight.detach()[:codes]
    length, offsets = math.prod(preview) + math.prod(grid), _offsets(preview, grid)
    return PromptedCodes(body, embedding, head, length, range(codes), offsets=offsets)


def _offsets(*grids: tuple[int, int]) -> Tensor:
    """Positions of inputs 0, 1, ... after that of input 0, int64 [3, 1 + N]."""
    parts, begin = [torch.zeros(3, 1, dtype=torch.int64)], 1
    for rows, columns in grids:
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        parts.append(begin + torch.stack([torch.zeros_like(x), y, x]).flatten(1))
        begin += max(rows, columns)
    return torch.cat(parts, 1)


def load(source: Source, wanted: LoadSettings) -> Hosted:
    """GLM-Image's first stage, and its second where the whole pipeline's folder was asked for."""
    wanted.refuse(f"{source.name} has its own", "tokenizer", "vqgan")
    if wanted.size:  # before weights are read
        check_multiple(wanted.size, _FACTOR)
    source.check(GlmImageDrawing)
    beside = source.folder.parent / PROCESSOR
    lies = source if (source.folder / "tokenizer_config.json").is_file() else replace(source, folder=beside)
    processor = lies.read("processor", GlmImageProcessor.from_pretrained)
    besides = () if source.whole or lies is source else (beside / "tokenizer.json",)
    network = source.network(GlmImageDrawing, wanted)
    stage, own = second_stage(source, wanted), source.sampling()
    codebook = F.normalize(network.model.vqmodel.quantize.embedding.weight.detach().float(), dim=-1)
    if own.top_k >= network.config.vq_config.num_embeddings:  # as published: all words of the head
        own = replace(own, top_k=0)

    def made(size: tuple[int, int]) -> Hosted:
        columns, rows = (pixels // _FACTOR for pixels in size)

        def prepared(text: str) -> Any:
            said = [{"role": "user", "content": [{"type": "text", "text": text}]}]
            whole = processor.apply_chat_template(said, tokenize=False)
            return processor(text=[whole], target_h=size[1], target_w=size[0], return_tensors="pt")

        _, preview = prepared("")["image_grid_thw"].tolist()
        drawn = target(network, (preview[1], preview[2]), (rows, columns))
        fits_context(source, drawn, size)
        config, known = PictureConfig(rows, columns, _FACTOR), isinstance(stage, str)
        last = None if known else partial(_second_picture, stage, threading.Lock(), config)
        skipped, missing = preview[1] * preview[2], stage if known else ""
        pictures = HostedPictures(config, codebook, skipped=skipped, missing=missing, stage=last)
        ask = prompts_of(lambda text: numbers(prepared(text)))
        return Hosted(drawn, pictures, ask, own, processor.tokenizer, besides=besides)

    return in_sizes(wanted, SIZES, made, _FACTOR)


def _second_picture(stage: Any, one: Any, config: PictureConfig, codes: Tensor, origin: Origin) -> Image.Image:
    """What the second stage makes of codes int64 [rows, columns]. one: lets one in, for its sampler counts steps."""
    prior = codes.repeat_interleave(_TWICE, 0).repeat_interleave(_TWICE, 1).reshape(1, -1)
    width, height = config.size
    with one:
        latents = _noise(stage, origin, config).to(codes.device)
        asked = {"prompt": origin.text, "prior_token_ids": prior, "latents": latents}
        made = stage(**asked, height=height, width=width)
    picture: Image.Image = made.images[0]
    return picture


def _noise(stage: Any, origin: Origin, config: PictureConfig) -> Tensor:
    """Where the second stage starts, float [1, C, h, w]."""
    scale = stage.vae_scale_factor
    width, height = config.size
    shape = (1, stage.transformer.config.in_channels, height // scale, width // scale)
    key = image_keys(origin.seed, STREAM_PICTURE, torch.tensor([origin.index]))
    drawn = normal(fold(key, torch.arange(torch.Size(shape).numel()))).view(shape)
    return drawn.to(stage.text_encoder.dtype)


def second_stage(source: Source, wanted: LoadSettings) -> Any:
    """The pipeline without its first stage; or why there is none. Raises UsageError for parts that cannot be read."""
    whole = source.whole
    if whole is None:
        return "only the first stage's folder was asked for, and a second stage makes pixels of its tokens"
    if lacking := [name for name in _PARTS if not (whole / name).is_dir()]:
        return f"{source.name} lacks the parts of the second stage: {', '.join(lacking)}"
    try:
        from diffusers import (
            AutoencoderKL,
            FlowMatchEulerDiscreteScheduler,
            GlmImagePipeline,
            GlmImageTransformer2DModel,
        )
    except ImportError:
        return "the second stage is diffusers' GlmImagePipeline, which is not installed: pip install -U diffusers"
    from transformers import ByT5Tokenizer, T5EncoderModel

    def part(name: str, kind: Any, **options: Any) -> Any:
        try:
            return kind.from_pretrained(str(whole / name), **options)
        except Exception as error:  # each library has classes of its own
            raise UsageError(f"{source.name}: its {name} could not be read: {one_line(error)}") from error

    def network(name: str, kind: Any, called: str, dtype: torch.dtype, **options: Any) -> Any:
        """With all its weights, which diffusers 0.42 and transformers 5.24 draw at random where they are missing."""
        check_counts(read_config(whole / name), whole / name / CONFIG)
        for path in (whole / name).glob("*.safetensors"):
            check_types(path, read_header(path), _TYPES)
        made, notes = part(name, kind, use_safetensors=True, output_loading_info=True, **{called: dtype}, **options)
        check_weights(f"{source.name}: {name}", made, notes)
        return made.to(wanted.device).eval().requires_grad_(False)

    eager = {"low_cpu_mem_usage": False}  # which needs accelerate, and says so
    stage = GlmImagePipeline(
        tokenizer=part("tokenizer", ByT5Tokenizer),
        processor=None,
        text_encoder=network("text_encoder", T5EncoderModel, "dtype", wanted.torch_dtype),
        vision_language_encoder=None,
        vae=network("vae", AutoencoderKL, "torch_dtype", torch.float32, **eager),
        transformer=network("transformer", GlmImageTransformer2DModel, "torch_dtype", wanted.torch_dtype, **eager),
        scheduler=part("scheduler", FlowMatchEulerDiscreteScheduler),
    )
    stage.set_progress_bar_config(disable=True)
    return stage
