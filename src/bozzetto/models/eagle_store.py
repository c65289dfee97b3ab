"""Folders that hold a drafter: config.json, model.safetensors. A drafter names the target it was trained for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from bozzetto.errors import UsageError
from bozzetto.files import digest, write_text
from bozzetto.models.eagle import EagleConfig, EagleNet
from bozzetto.models.llamagen import LlamaGenConfig
from bozzetto.models.store import CONFIG, WEIGHTS, config_from, load_strict, read_config, read_weights, save_weights

FAMILY = "eagle"
EMBEDDING = "embed_tokens.weight"


def target_digest(folder: str | Path) -> str:
    """What tells one target from another: a digest of its weights."""
    return digest(Path(folder) / WEIGHTS)


def save_eagle(folder: str | Path, net: EagleNet, target: Path, notes: dict[str, Any]) -> None:
    """Write a drafter folder for the target in the model folder `target`."""
    folder = Path(folder)
    save_weights(folder / WEIGHTS, net)
    config = dataclasses.asdict(net.config)
    content = {"family": FAMILY, "config": config, "target_weights": target_digest(target), **notes}
    write_text(folder / CONFIG, json.dumps(content, indent=2) + "\n")


def load_eagle(folder: str | Path, target: LlamaGenConfig, weights: str) -> EagleNet:
    """Read a drafter for a target with this config and this digest of its weights; float32, in evaluation mode.

    Raises UsageError for another family, another target, or a shape that is not the target's.
    """
    folder = Path(folder)
    content = read_config(folder)
    if content.get("family") != FAMILY:
        raise UsageError(f"{folder / CONFIG}: family is {content.get('family')!r} (allowed for a drafter: {FAMILY!r})")
    config = config_from(EagleConfig, content.get("config"), folder / CONFIG)
    for name in ("dim", "vocab", "grid"):
        have, want = getattr(config, name), getattr(target, name)
        if have != want:
            raise UsageError(f"{folder}: a drafter of another target: {name} = {have}, the target has {want}")
    if content.get("target_weights") not in (None, weights):
        name = content.get("target_name", "unknown")
        raise UsageError(f"{folder}: a drafter of another target: it was trained for the weights of {name!r} "
                         f"({content['target_weights']}), the target's are {weights}")
    net = EagleNet(config)
    state = {key: value for key, value in read_weights(folder / WEIGHTS).items() if key != EMBEDDING}
    load_strict(net, state, folder / WEIGHTS)
    return net.eval().requires_grad_(False)
