"""Decoders of codes from published tokenizer checkpoints, for adapters that name one: LlamaGen's VQ, VQGANs of
Chameleon's kind, MoVQGANs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.autoencoders.kl16 import KL16Decoder, decoder_config, decoder_part, from_published
from bozzetto.autoencoders.llamagen_vq import USED, LlamaGenVQ, infer_config
from bozzetto.autoencoders.llamagen_vq import from_published as vq_published
from bozzetto.autoencoders.movqgan import MoVQDecoder, from_published_movq, recognise_movq
from bozzetto.checkpoints.states import read_state
from bozzetto.checkpoints.weights import check_fit, fill, load_strict, on_meta
from bozzetto.errors import UsageError

_CODES, _FIRST = "quantize.embedding.weight", "decoder.conv_in.weight"


class CodeDecoder(nn.Module):
    """int64 [B, rows, columns] -> [B, 3, H, W] in [0, 1]. codebook: float [V, d]; decoder: [B, d, rows, columns] of its
    rows -> pixels."""

    codebook: Tensor

    def __init__(self, codebook: Tensor, decoder: nn.Module):
        super().__init__()
        self.decoder = decoder
        self.register_buffer("codebook", codebook)

    def forward(self, codes: Tensor) -> Tensor:
        return self.decoder(F.embedding(codes, self.codebook).permute(0, 3, 1, 2))


def vqgan_decoder(state: Mapping[str, Tensor], path: Path) -> CodeDecoder:
    """Of Chameleon's kind: the decoder of KL-16, under the same names."""
    config, part = decoder_config(state), {key: value.float() for key, value in decoder_part(state).items()}
    decoder = KL16Decoder(config)
    load_strict(decoder, from_published(part, len(config.widths)), path)
    return CodeDecoder(state[_CODES].float(), decoder)


class _LlamaGen(nn.Module):
    def __init__(self, whole: LlamaGenVQ):
        super().__init__()
        self.inner, self.outer = whole.post_quant_conv, whole.decoder

    def forward(self, codes: Tensor) -> Tensor:
        return (self.outer(self.inner(codes)) + 1) / 2


def llamagen_decoder(state: Mapping[str, Tensor], path: Path) -> CodeDecoder:
    """LlamaGen's VQ-16 or VQ-8."""
    levels = len({key.split(".")[2] for key in state if key.startswith("encoder.conv_blocks.")})
    whole = LlamaGenVQ(infer_config(state, 2 ** max(levels - 1, 0)))
    load_strict(whole, vq_published({key: value for key, value in state.items() if key != USED}), path)
    return CodeDecoder(whole.codebook, _LlamaGen(whole))


def movqgan_decoder(state: Mapping[str, Tensor], path: Path) -> nn.Module:
    """ai-forever's."""
    parts = recognise_movq(state, path)
    decoder, named = on_meta(lambda: MoVQDecoder(*parts)), from_published_movq(state, len(parts[0].widths))
    check_fit(decoder.state_dict(), named, path)
    return fill(decoder, named)


DECODERS: Mapping[str, Callable[[Mapping[str, Tensor], Path], nn.Module]] = MappingProxyType(
    {"llamagen": llamagen_decoder, "vqgan": vqgan_decoder, "movqgan": movqgan_decoder}
)


def read_decoder(kind: str, path: Path) -> Any:
    """The decoder of a checkpoint (a pickle, opened safely, or safetensors): codes int64 [B, rows, columns] -> pixels;
    it has its `codebook`. Raises UsageError for a file of another kind, or that does not fit together."""
    state = read_state(path)
    if _CODES not in state or _FIRST not in state:
        raise UsageError(f"{path}: not a tokenizer of codes (wanted {_CODES}, {_FIRST}, ...)")
    try:
        made = DECODERS[kind](state, path)
    except (KeyError, IndexError) as error:
        raise UsageError(f"{path}: not a tokenizer of kind {kind}: no {error.args[0]}") from error
    return made.eval().requires_grad_(False)


@torch.no_grad()
def scale_of(decoder: Any) -> int:
    """Pixels per code and side, found by trying four codes (of one alone torch's group norm makes no mean)."""
    return int(decoder(torch.zeros(1, 2, 2, dtype=torch.int64, device=decoder.codebook.device)).shape[-1]) // 2
