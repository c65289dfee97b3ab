"""GLM-Image's second stage: from tokens to pixels by diffusion, as diffusers holds it (GlmImagePipeline).

It reads the prompt too (its words in quotes, letter by letter) and starts from noise, which here is a function of
(seed, image), so that it needs to know what a picture was drawn for. Without it there are tokens only.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bozzetto.adapters.checkpoint import check_counts, check_types
from bozzetto.adapters.pictures import PictureConfig
from bozzetto.adapters.source import Source, check_weights
from bozzetto.adapters.undecoded import TokenPictures
from bozzetto.checkpoints.folders import CONFIG, read_config
from bozzetto.checkpoints.load_settings import LoadSettings
from bozzetto.checkpoints.weights import header_of, open_tensors
from bozzetto.common.images import Origin
from bozzetto.errors import UsageError
from bozzetto.laws.noise import STREAM_PICTURE, fold, image_keys, normal

FACTOR = 32  # pixels per token and side
_TWICE = 2  # the second stage has a token for each 16 pixels
_TYPES = ("F16", "BF16", "F32")  # diffusers 0.42 leaves float64 as it is beside others
_PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")


class GlmImagePictures(TokenPictures):
    """stage: the second stage; skipped: tokens before those of the picture."""

    def __init__(self, config: PictureConfig, codebook: Tensor, skipped: int, stage: Any, missing: str):
        super().__init__(config, codebook, missing)
        self.skipped, self.stage, self.lock = skipped, stage, threading.Lock()  # its sampler counts steps

    def codes(self, tokens: Tensor) -> Tensor:
        return super().codes(tokens[:, self.skipped :])

    def codes_drawn(self, count: int) -> int:
        return max(0, count - self.skipped)

    @torch.no_grad()
    def picture(self, tokens: Tensor, origin: Origin | None) -> Image.Image:
        if self.stage is None or origin is None:
            return super().picture(tokens, origin)
        codes = self.codes(tokens[None])[0]
        prior = codes.repeat_interleave(_TWICE, 0).repeat_interleave(_TWICE, 1).reshape(1, -1)
        with self.lock:
            latents = _noise(self.stage, origin, self.config).to(tokens.device)
            size = {"height": self.config.height, "width": self.config.width}
            made = self.stage(prompt=origin.text, prior_token_ids=prior, latents=latents, **size)
        picture: Image.Image = made.images[0]
        return picture


def _noise(stage: Any, origin: Origin, config: PictureConfig) -> Tensor:
    """Where the second stage starts, float [1, C, h, w]."""
    scale = stage.vae_scale_factor
    shape = (1, stage.transformer.config.in_channels, config.height // scale, config.width // scale)
    key = image_keys(origin.seed, STREAM_PICTURE, torch.tensor([origin.index]))
    drawn = normal(fold(key, torch.arange(torch.Size(shape).numel()))).view(shape)
    return drawn.to(stage.text_encoder.dtype)


def glm_pictures(network: Any, stage: Any, skipped: int, rows: int, columns: int) -> GlmImagePictures:
    """network: GlmImageForConditionalGeneration; stage: as `second_stage` gives it."""
    codebook = F.normalize(network.model.vqmodel.quantize.embedding.weight.detach().float(), dim=-1)
    made, missing = (None, stage) if isinstance(stage, str) else (stage, "")
    return GlmImagePictures(PictureConfig.of(rows, columns, FACTOR), codebook, skipped, made, missing)


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
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UsageError(f"{source.name}: its {name} could not be read: {reason}") from error

    def network(name: str, kind: Any, called: str, dtype: torch.dtype, **options: Any) -> Any:
        """With all its weights, which diffusers 0.42 and transformers 5.24 draw at random where they are missing."""
        check_counts(read_config(whole / name), whole / name / CONFIG)
        for path in (whole / name).glob("*.safetensors"):
            with open_tensors(path) as content:
                check_types(path, header_of(content), _TYPES)
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
