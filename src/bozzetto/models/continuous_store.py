"""Folders of continuous-token models: what store.py is for codes.

config.json (family flow or mar, the sampler's steps, notes), model.safetensors (float16), tokenizer.json and
tokenizer.safetensors (the decoder of latents with the scale of the tokens).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bozzetto.autoencoders.kl16 import KL16Config, kl16_latents
from bozzetto.autoencoders.latents import KL16, TINY, LatentConfig, LatentDecoder, tiny_latents
from bozzetto.errors import UsageError
from bozzetto.files import write_text
from bozzetto.models.flow import FlowConfig, FlowModel
from bozzetto.models.mar import MAR, MARConfig
from bozzetto.models.store import (
    CONFIG,
    TOKENIZER_CONFIG,
    TOKENIZER_WEIGHTS,
    WEIGHTS,
    config_from,
    load_strict,
    read_config,
    read_weights,
    save_state,
)

FLOW, MASKED = "flow", "mar"
_FAMILIES: dict[str, tuple[type, type]] = {FLOW: (FlowConfig, FlowModel), MASKED: (MARConfig, MAR)}
_DECODERS: dict[str, tuple[type[LatentConfig], Callable[[Any], LatentDecoder]]] = {
    TINY: (LatentConfig, lambda config: tiny_latents(config.image_size)),
    KL16: (KL16Config, kl16_latents),
}


def write_continuous(
    folder: Path, family: str, config: object, state: Mapping[str, Tensor], notes: dict, compact: bool = False
) -> None:
    """config.json and model.safetensors. config: a FlowConfig or MARConfig; compact: see `save_state`."""
    save_state(folder / WEIGHTS, state, compact)
    content = {"family": family, "config": dataclasses.asdict(config), **notes}  # type: ignore[call-overload]
    write_text(folder / CONFIG, json.dumps(content, indent=2) + "\n")


def write_latents(folder: Path, kind: str, config: LatentConfig, state: Mapping[str, Tensor], notes: dict) -> None:
    """tokenizer.json and tokenizer.safetensors. state: of the LatentDecoder (scale, shift, decoder.*)."""
    save_state(folder / TOKENIZER_WEIGHTS, state)
    content = {"kind": kind, "config": dataclasses.asdict(config), **notes}
    write_text(folder / TOKENIZER_CONFIG, json.dumps(content, indent=2) + "\n")


def load_continuous(folder: Path) -> FlowModel | MAR:
    """Read the network of a folder of family flow or mar; float32, in evaluation mode.

    Raises UsageError for another family, and for missing, misshapen or non-finite weights.
    """
    content, source = read_config(folder), folder / CONFIG
    family = content.get("family")
    if family not in _FAMILIES:
        raise UsageError(f"{source}: family is {family!r} (allowed: {', '.join(map(repr, _FAMILIES))})")
    config_kind, model_kind = _FAMILIES[family]
    config = config_from(config_kind, content.get("config"), source)
    with torch.device("meta"):
        wanted = model_kind(config)
    state = read_weights(folder / WEIGHTS)
    load_strict(wanted, state, folder / WEIGHTS, assign=True)
    model: FlowModel | MAR = wanted
    if isinstance(model, FlowModel):
        model.reset_rope()
    return model.eval().requires_grad_(False)


def load_latents(folder: Path) -> LatentDecoder:
    """Read the decoder of a folder; float32, in evaluation mode. Where tokenizer.json says `same_as`, its weights are
    those of the folder of that name beside it. Raises UsageError as load_continuous does, and for a missing extra
    package."""
    content, source = read_config(folder, TOKENIZER_CONFIG), folder / TOKENIZER_CONFIG
    kind = content.get("kind")
    if kind not in _DECODERS:
        raise UsageError(f"{source}: kind is {kind!r} (allowed: {', '.join(map(repr, _DECODERS))})")
    config_kind, make = _DECODERS[kind]
    config = config_from(config_kind, content.get("config"), source)
    with torch.device("meta"):  # drawing 66 million random numbers only to overwrite them takes seconds
        decoder = make(config)
    weights = (folder.parent / str(content["same_as"]) if "same_as" in content else folder) / TOKENIZER_WEIGHTS
    load_strict(decoder, read_weights(weights), weights, assign=True)
    return decoder.eval().requires_grad_(False)


def notes_of(folder: Path) -> dict[str, Any]:
    """Everything in config.json besides family and config."""
    return {k: v for k, v in read_config(folder).items() if k not in ("family", "config")}
