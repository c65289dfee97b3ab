"""Folders of continuous-token models: what store.py is for codes.

config.json (family flow or mar, the sampler's steps, notes), model.safetensors, tokenizer.json and
tokenizer.safetensors (the decoder of latents with the scale of the tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bozzetto.autoencoders.kl16 import KL16Config, kl16_latents
from bozzetto.autoencoders.latents import KL16, TINY, LatentConfig, LatentDecoder, tiny_latents
from bozzetto.autoencoders.tiny import DOWNSAMPLE, LATENT_CHANNELS
from bozzetto.checkpoints.store import (
    CONFIG,
    TOKENIZER_CONFIG,
    TOKENIZER_WEIGHTS,
    WEIGHTS,
    choose,
    load_module,
    load_streamed,
    read_config,
    save_state,
    tokenizer_weights,
    write_config,
)
from bozzetto.common.checks import config_from
from bozzetto.errors import UsageError
from bozzetto.targets.flow import FlowConfig, FlowModel
from bozzetto.targets.mar import MAR, MARConfig

FLOW, MASKED = "flow", "mar"
FAMILIES: dict[str, tuple[type, type]] = {FLOW: (FlowConfig, FlowModel), MASKED: (MARConfig, MAR)}
LAYERS: dict[type, tuple[str, ...]] = {FlowModel: ("layers",), MAR: ("encoder_blocks", "decoder_blocks")}
DECODERS: dict[str, tuple[type[LatentConfig], Callable[[Any], LatentDecoder]]] = {
    TINY: (LatentConfig, lambda config: tiny_latents(config.image_size)),
    KL16: (KL16Config, kl16_latents),
}


def write_continuous(
    folder: Path,
    family: str,
    config: object,
    state: Mapping[str, Tensor],
    notes: dict,
    compact: bool = False,
    store: str = "float16",
) -> None:
    """config.json and model.safetensors. config: a FlowConfig or MARConfig; compact, store: see `save_state`."""
    save_state(folder / WEIGHTS, state, compact, store)
    write_config(folder, {"family": family}, config, notes)


def write_latents(
    folder: Path, kind: str, config: LatentConfig, state: Mapping[str, Tensor], notes: dict, store: str = "float16"
) -> None:
    """tokenizer.json and tokenizer.safetensors. state: of the LatentDecoder (scale, shift, decoder.*); store: see
    `save_state`."""
    save_state(folder / TOKENIZER_WEIGHTS, state, store=store)
    write_config(folder, {"kind": kind}, config, notes, TOKENIZER_CONFIG)


def load_continuous(
    folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> FlowModel | MAR:
    """Read the network of a folder of family flow or mar; float32, in evaluation mode. dtype: for a target in this type
    on the device, with layers that are Streamed (the head stays in float32, which parts of it are computed in).

    Raises UsageError for another family, and for missing, misshapen or non-finite weights.
    """
    content, source = read_config(folder), folder / CONFIG
    config_kind, kind = choose(content, "family", FAMILIES, source)
    config = config_from(config_kind, content.get("config"), source)
    model: FlowModel | MAR
    if dtype is None:
        model = load_module(lambda: kind(config), folder / WEIGHTS)
    else:
        lists = LAYERS[kind]
        model = load_streamed(lambda: kind(config), folder / WEIGHTS, lists, dtype, device, torch.float32)
    return model


def load_latents(folder: Path) -> LatentDecoder:
    """Read the decoder of a folder; float32, in evaluation mode. Where tokenizer.json says `same_as`, its weights are
    those of the folder of that name beside it. Raises UsageError as load_continuous does, and for a missing extra
    package."""
    content, source = read_config(folder, TOKENIZER_CONFIG), folder / TOKENIZER_CONFIG
    config_kind, make = choose(content, "kind", DECODERS, source)
    config = config_from(config_kind, content.get("config"), source)
    if config_kind is LatentConfig and (config.token_dim, config.downsample) != (LATENT_CHANNELS, DOWNSAMPLE):
        raise UsageError(f"{source}: {TINY!r} has token_dim {LATENT_CHANNELS} and downsample {DOWNSAMPLE}")
    return load_module(lambda: make(config), tokenizer_weights(folder, content))


def notes_of(folder: Path) -> dict[str, Any]:
    """Everything in config.json besides family and config."""
    return {k: v for k, v in read_config(folder).items() if k not in ("family", "config")}
