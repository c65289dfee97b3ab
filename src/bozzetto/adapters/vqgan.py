"""The decoder of Chameleon's image tokens, which transformers does not hold: from the published tokenizer checkpoint,
or from the model's own files where they carry it.

A VQGAN (Esser et al., arXiv 2012.09841), which adapters/decoders.py reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from bozzetto.adapters.chameleon_files import ChameleonFiles
from bozzetto.adapters.decoders import vqgan_decoder
from bozzetto.adapters.lined import without_line_ends
from bozzetto.adapters.pictures import HostedPictures, LinedPictures, PictureConfig
from bozzetto.adapters.source import Source
from bozzetto.autoencoders.kl16 import decoder_config
from bozzetto.checkpoints.load_settings import LoadSettings
from bozzetto.checkpoints.states import check_finite, read_state
from bozzetto.errors import UsageError

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
    scale, decoder = decoder_config(state).downsample, vqgan_decoder(state, where).eval().requires_grad_(False)

    def made(rows: int, columns: int, device: torch.device) -> HostedPictures:
        decoder.to(device)

        def pixels(tokens: Tensor) -> Tensor:
            return decoder(without_line_ends(tokens, columns) if lined else tokens.unflatten(1, (rows, columns)))

        kind = LinedPictures if lined else HostedPictures
        return kind(PictureConfig.of(rows, columns, scale), decoder.codebook, pixels)

    return made


def _decoder(source: Source, wanted: LoadSettings, inside: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Path]:
    """The state of a VQGAN, and where it is from."""
    found = (source.folder / name for name in NAMES)
    path = Path(wanted.vqgan) if wanted.vqgan else next((file for file in found if file.is_file()), None)
    if path is None and "decoder.conv_in.weight" not in inside:
        raise UsageError(
            f"{source.name}: no decoder for its image tokens: transformers holds none, so give the published tokenizer "
            f"checkpoint (of Meta's Chameleon) with --vqgan, or put it into the model's folder as {' or '.join(NAMES)}"
        )
    where = source.folder if path is None else path
    state = inside if path is None else read_state(path)
    if path is None:
        check_finite(where, {key: value for key, value in inside.items() if not key.startswith("encoder.")})
    if _CODES not in state or "decoder.conv_in.weight" not in state:
        raise UsageError(f"{where}: not a VQGAN tokenizer (wanted {_CODES}, decoder.conv_in.weight, ...)")
    return state, where
