"""From image tokens of transformers models to pixels, in float32: by a model's own decoder, or by that of a published
tokenizer checkpoint. Tokens that cannot become pictures here are drawn and written all the same, and shown as what they
are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from bozzetto.autoencoders import llamagen_vq
from bozzetto.autoencoders.decoder import PublishedDecoder
from bozzetto.autoencoders.kl16 import decoder_state, infer_config, kl16_decoder
from bozzetto.autoencoders.movqgan import CODEBOOK, from_published_movq, movq_decoder
from bozzetto.checkpoints.states import read_state
from bozzetto.checkpoints.weights import check_fit, fill, load_strict, on_meta
from bozzetto.common.images import Origin, to_picture
from bozzetto.errors import UsageError

FIRST = "decoder.conv_in.weight"  # every tokenizer of codes has it
_MARK = "tokens, not a picture"
_LINE = 14  # pixels of a line of text


@dataclass(frozen=True)
class PictureConfig:
    """rows, columns: of codes; scale: pixels per code and side."""

    rows: int
    columns: int
    scale: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        return self.rows, self.columns

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.columns * self.scale, self.rows * self.scale


class HostedPictures:
    """What a pipeline asks of a tokenizer.

    codebook: float [V', d], the codes that stand for something (V' is V, or one less where the last token ends a row;
    [0, d]: they are not known); decoder: codes int64 [B, rows, columns], or tokens float [B, rows, columns, D] ->
    float [B, 3, H, W] (None: maps of the tokens, a colour for each code); lined: whether each row of tokens has an end;
    skipped: tokens before those of the picture; missing: why there are tokens and no pictures ("": there are, or maps
    are their previews); stage: makes pictures of codes int64 [rows, columns] and an image's origin (None: the decoder
    does).
    """

    encodes = False

    def __init__(
        self,
        config: PictureConfig,
        codebook: Tensor,
        decoder: Callable[[Tensor], Tensor] | None = None,
        lined: bool = False,
        skipped: int = 0,
        missing: str = "",
        stage: Callable[[Tensor, Origin], Image.Image] | None = None,
    ):
        self.config, self.codebook, self.lined, self.skipped, self.missing = config, codebook, lined, skipped, missing
        self.decoder, self.stage = self._map if decoder is None else decoder, stage
        self.mark = _marked(*config.size) if missing else None

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """int64 [B, N] or float [B, N, D] -> [B, 3, H, W] in [0, 1]."""
        return self.decoder(self.codes(tokens)).float().clamp(0, 1)

    @torch.no_grad()
    def picture(self, tokens: Tensor, origin: Origin | None) -> Image.Image:
        """Tokens [N] or [N, D] of an image -> its picture. origin: what it was drawn for, where that is known."""
        if self.stage is not None and origin is not None:
            return self.stage(self.codes(tokens[None])[0], origin)
        return to_picture(self.decode(tokens[None])[0])

    def codes(self, tokens: Tensor) -> Tensor:
        """int64 [B, N] -> the codes in their places, int64 [B, rows, columns]; likewise tokens [B, N, D]."""
        width = self.config.columns
        return tokens[:, self.skipped :].unflatten(1, (self.config.rows, width + self.lined))[:, :, :width]

    def codes_drawn(self, count: int) -> int:
        """How many codes the first `count` tokens hold."""
        count = max(0, count - self.skipped)
        return count - count // (self.config.columns + 1) if self.lined else count

    def _map(self, codes: Tensor) -> Tensor:
        colour = torch.stack([(codes * step + 31) % 256 for step in (97, 57, 151)], 1) / 255.0
        pixels = colour.repeat_interleave(self.config.scale, 2).repeat_interleave(self.config.scale, 3)
        if self.mark is None:
            return pixels
        return torch.where(self.mark[0].to(pixels.device), self.mark[1].to(pixels), pixels)


def _marked(width: int, height: int) -> tuple[Tensor, Tensor]:
    """Where a line stands that says what a map is, bool [H, W], and its pixels float [H, W]."""
    image = Image.new("L", (width, height))
    ImageDraw.Draw(image).text((2, 1), _MARK, fill=255)
    where = torch.zeros(height, width, dtype=torch.bool)
    where[: min(_LINE, height)] = True
    return where, torch.from_numpy(np.asarray(image) / 255.0)


def vqgan_decoder(state: Mapping[str, Tensor], path: Path) -> PublishedDecoder:
    """Of Chameleon's kind: the decoder of KL-16, under the same names."""
    decoder = kl16_decoder(infer_config(state))
    load_strict(decoder, decoder_state(state), path)
    decoder.codebook = state[CODEBOOK].float()
    return decoder


def llamagen_decoder(state: Mapping[str, Tensor], path: Path) -> PublishedDecoder:
    """LlamaGen's VQ-16 or VQ-8."""
    whole = llamagen_vq.LlamaGenVQ(llamagen_vq.infer_config(state))
    load_strict(whole, llamagen_vq.from_published(state), path)
    return PublishedDecoder(whole, whole.codebook)


def movqgan_decoder(state: Mapping[str, Tensor], path: Path) -> PublishedDecoder:
    """ai-forever's."""
    decoder = on_meta(lambda: movq_decoder(state, path))
    named = from_published_movq(state)
    check_fit(decoder.state_dict(), named, path)
    return fill(decoder, named)


DECODERS: Mapping[str, Callable[[Mapping[str, Tensor], Path], PublishedDecoder]] = MappingProxyType(
    {"llamagen": llamagen_decoder, "vqgan": vqgan_decoder, "movqgan": movqgan_decoder}
)


def read_decoder(kind: str, path: Path) -> Any:
    """The decoder of a checkpoint (a pickle, opened safely, or safetensors): codes int64 [B, rows, columns] -> pixels;
    it has its `codebook`. Raises UsageError for a file of another kind, or that does not fit together."""
    state = read_state(path)
    if CODEBOOK not in state or FIRST not in state:
        raise UsageError(f"{path}: not a tokenizer of codes (wanted {CODEBOOK}, {FIRST}, ...)")
    try:
        made = DECODERS[kind](state, path)
    except (KeyError, IndexError) as error:
        raise UsageError(f"{path}: not a tokenizer of kind {kind}: no {error.args[0]}") from error
    return made.eval().requires_grad_(False)


@torch.no_grad()
def scale_of(decoder: Any) -> int:
    """Pixels per code and side, found by trying four codes (of one alone torch's group norm makes no mean)."""
    return int(decoder(torch.zeros(1, 2, 2, dtype=torch.int64, device=decoder.codebook.device)).shape[-1]) // 2
