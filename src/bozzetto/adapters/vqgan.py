"""The decoder of Chameleon's image tokens, which transformers does not hold: from the published tokenizer checkpoint,
or from the model's own files where they carry it.

A VQGAN (Esser et al., arXiv 2012.09841) whose decoder is that of the autoencoder in autoencoders/kl16.py, so the same
key map serves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from bozzetto.adapters.chameleon_files import ChameleonFiles
from bozzetto.adapters.lined import without_line_ends
from bozzetto.adapters.pictures import HostedPictures, LinedPictures, PictureConfig
from bozzetto.adapters.source import Source
from bozzetto.autoencoders.kl16 import KL16Config, KL16Decoder, decoder_part, from_published, numbered
from bozzetto.errors import UsageError
from bozzetto.load_settings import LoadSettings
from bozzetto.models.convert import read_state
from bozzetto.models.store import load_strict

NAMES = ("vqgan.safetensors", "vqgan.ckpt", "tokenizer/vqgan.ckpt")
_CODES = "quantize.embedding.weight"


def vqgan_pictures(
    source: Source, wanted: LoadSettings, files: ChameleonFiles, lined: bool = False
) -> Callable[[int, int, torch.device], HostedPictures]:
    """What makes pictures of so many rows and columns of codes on a device. The decoder is that of `wanted`, else that
    of a file in the model's folder under one of NAMES, else that of the model's own VQ model; lined: whether each row
    of tokens has an end.

    Raises UsageError where it is missing, of another family, or of other codes than the model's.
    """
    state, where = _decoder(source, wanted, files.vq)
    codebook, own = state[_CODES].float(), files.vq.get(_CODES)
    same = own is None or (own.shape == codebook.shape and torch.allclose(codebook, own.float(), rtol=1e-2, atol=1e-2))
    if not same or len(codebook) != files.codes:
        raise UsageError(f"{where}: its codes are not those of {source.name}")
    config = decoder_config(state)
    decoder = KL16Decoder(config)
    part = {key: value.float() for key, value in decoder_part(state).items()}
    load_strict(decoder, from_published(part, len(config.widths)), where)
    decoder.eval().requires_grad_(False)

    def made(rows: int, columns: int, device: torch.device) -> HostedPictures:
        decoder.to(device)
        entries = codebook.to(device)

        def pixels(tokens: Tensor) -> Tensor:
            found = without_line_ends(tokens, columns).flatten(1) if lined else tokens
            return decoder(entries[found].transpose(1, 2).unflatten(2, (rows, columns)))

        kind = LinedPictures if lined else HostedPictures
        return kind(PictureConfig.of(rows, columns, config.downsample), entries, pixels)

    return made


def _decoder(source: Source, wanted: LoadSettings, inside: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Path]:
    """The state of a VQGAN, and where it is from."""
    found = (source.folder / name for name in NAMES)
    path = Path(wanted.vqgan) if wanted.vqgan else next((file for file in found if file.is_file()), None)
    if path is None and "decoder.conv_in.weight" not in inside:
        raise UsageError(
            f"{source.name}: no decoder for its image tokens: transformers holds none, so give the published tokenizer "
            f"checkpoint with --vqgan, or put it into the model's folder as {' or '.join(NAMES)}"
        )
    state = inside if path is None else read_state(path)
    where = source.folder if path is None else path
    if _CODES not in state or "decoder.conv_in.weight" not in state:
        raise UsageError(f"{where}: not a VQGAN tokenizer (wanted {_CODES}, decoder.conv_in.weight, ...)")
    return state, where


def decoder_config(state: Mapping[str, Tensor]) -> KL16Config:
    """The decoder's widths, from the shapes of its tensors. Raises UsageError as KL16Config does."""
    levels = numbered(state, "decoder.up.")
    widths = [len(state[f"decoder.up.{n}.block.0.conv1.weight"]) for n in range(levels)]
    scale = 2 ** (levels - 1)
    return KL16Config(
        image_size=scale,  # of one code: it takes any number of them
        token_dim=state["post_quant_conv.weight"].shape[1],
        downsample=scale,
        channels=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=numbered(state, "decoder.up.0.block.") - 1,
    )
