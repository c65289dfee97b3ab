"""The decoder of Chameleon's image tokens, which transformers does not hold: from the published tokenizer checkpoint.

A VQGAN (Esser et al., arXiv 2012.09841) whose decoder is that of the autoencoder in autoencoders/kl16.py, so the same
key map serves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bozzetto.adapters.lined import without_line_ends
from bozzetto.adapters.pictures import HostedPictures, LinedPictures, PictureConfig
from bozzetto.autoencoders.kl16 import KL16Config, KL16Decoder, decoder_part, from_published, numbered
from bozzetto.errors import UsageError
from bozzetto.models.convert import read_state
from bozzetto.models.store import load_strict

NAMES = ("vqgan.safetensors", "vqgan.ckpt")
_CODES = "quantize.embedding.weight"


def chameleon_pictures(model: str | Path, network: Any, rows: int, columns: int, lined: bool = False) -> HostedPictures:
    """Pictures of a Chameleon model in a folder that also holds the tokenizer's checkpoint under one of NAMES. rows,
    columns: of codes; lined: whether each row of tokens has an end.

    Raises UsageError where it is missing, of another family, or of other codes than the model's.
    """
    path = next((Path(model) / name for name in NAMES if (Path(model) / name).is_file()), None)
    if path is None:
        raise UsageError(
            f"{model}: no decoder for its image tokens: transformers holds none, so put the published tokenizer "
            f"checkpoint into the model's folder as {' or '.join(NAMES)}"
        )
    state = read_state(path)
    if _CODES not in state or "decoder.conv_in.weight" not in state:
        raise UsageError(f"{path}: not a VQGAN tokenizer (wanted {_CODES}, decoder.conv_in.weight, ...)")
    codebook, own = state[_CODES].float(), network.model.vqmodel.quantize.embedding.weight.detach().float().cpu()
    if codebook.shape != own.shape or not torch.allclose(codebook, own, rtol=1e-2, atol=1e-2):
        raise UsageError(f"{path}: its codes are not those of {model}")
    config = decoder_config(state, columns)
    decoder = KL16Decoder(config)
    load_strict(decoder, from_published(decoder_part(state), len(config.widths)), path)
    decoder = decoder.to(network.device).eval().requires_grad_(False)
    codebook = codebook.to(network.device)

    def pixels(tokens: Tensor) -> Tensor:
        codes = without_line_ends(tokens, columns).flatten(1) if lined else tokens
        return decoder(codebook[codes].transpose(1, 2).unflatten(2, (rows, columns)))

    made = LinedPictures if lined else HostedPictures
    return made(PictureConfig.of(rows, columns, config.downsample), codebook, pixels)


def decoder_config(state: Mapping[str, Tensor], grid: int) -> KL16Config:
    """The decoder's widths, from the shapes of its tensors. Raises UsageError as KL16Config does."""
    levels = numbered(state, "decoder.up.")
    widths = [len(state[f"decoder.up.{n}.block.0.conv1.weight"]) for n in range(levels)]
    return KL16Config(
        image_size=grid * 2 ** (levels - 1),
        token_dim=state["post_quant_conv.weight"].shape[1],
        downsample=2 ** (levels - 1),
        channels=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=numbered(state, "decoder.up.0.block.") - 1,
    )
