"""Folders that hold a drafter of continuous tokens: config.json (family sketch), model.safetensors (matrices as int8
rows: a draft may be any law, so that rounding costs a little acceptance and nothing else)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bozzetto.checkpoints.store import (
    CONFIG,
    WEIGHTS,
    check_target,
    choose,
    load_module,
    read_config,
    save_state,
    target_digest,
    write_config,
)
from bozzetto.common.checks import config_from
from bozzetto.drafters.gaussian import GaussianConfig, GaussianNet
from bozzetto.targets.flow import FlowConfig

SKETCH = "sketch"  # the family, and the folder inside a model's


def save_sketch(folder: str | Path, net: GaussianNet, target: Path, notes: dict[str, Any]) -> None:
    """Write a drafter folder for the target in the model folder `target`."""
    folder = Path(folder)
    save_state(folder / WEIGHTS, net.state_dict(), compact=True)
    write_config(folder, {"family": SKETCH}, net.config, {"target_weights": target_digest(target), **notes})


def load_sketch(folder: str | Path, target: FlowConfig, weights: str) -> GaussianNet:
    """Read a drafter for a target with this config and this digest of its weights; float32, in evaluation mode.

    Raises UsageError for another family, another target, or a shape that is not the target's.
    """
    folder = Path(folder)
    content, source = read_config(folder), folder / CONFIG
    config = config_from(choose(content, "family", {SKETCH: GaussianConfig}, source), content.get("config"), source)
    check_target(folder, content, config, target, weights)
    return load_module(lambda: GaussianNet(config), folder / WEIGHTS)
