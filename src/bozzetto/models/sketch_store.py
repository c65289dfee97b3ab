"""Folders that hold a drafter of continuous tokens: config.json (family sketch), model.safetensors (matrices as int8
rows: a draft may be any law, so that rounding costs a little acceptance and nothing else)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from bozzetto.errors import UsageError
from bozzetto.files import write_text
from bozzetto.models.eagle_store import target_digest
from bozzetto.models.flow import FlowConfig
from bozzetto.models.path_sketch import PathSketch, SketchConfig
from bozzetto.models.store import CONFIG, WEIGHTS, config_from, load_strict, read_config, read_weights, save_state

SKETCH = "sketch"  # the family, and the folder inside a model's


def save_sketch(folder: str | Path, net: PathSketch, target: Path, notes: dict[str, Any]) -> None:
    """Write a drafter folder for the target in the model folder `target`."""
    folder = Path(folder)
    save_state(folder / WEIGHTS, net.state_dict(), compact=True)
    config = dataclasses.asdict(net.config)
    content = {"family": SKETCH, "config": config, "target_weights": target_digest(target), **notes}
    write_text(folder / CONFIG, json.dumps(content, indent=2) + "\n")


def load_sketch(folder: str | Path, target: FlowConfig, weights: str) -> PathSketch:
    """Read a drafter for a target with this config and this digest of its weights; float32, in evaluation mode.

    Raises UsageError for another family, another target, or a shape that is not the target's.
    """
    folder = Path(folder)
    content = read_config(folder)
    if content.get("family") != SKETCH:
        raise UsageError(f"{folder / CONFIG}: family is {content.get('family')!r} (allowed here: {SKETCH!r})")
    config = config_from(SketchConfig, content.get("config"), folder / CONFIG)
    for name in ("dim", "token_dim", "grid"):
        have, want = getattr(config, name), getattr(target, name)
        if have != want:
            raise UsageError(f"{folder}: a drafter of another target: {name} = {have}, the target has {want}")
    if content.get("target_weights") != weights:
        name = content.get("target_name", "unknown")
        raise UsageError(
            f"{folder}: a drafter of another target: it was trained for the weights of {name!r} "
            f"({content.get('target_weights')}), the target's are {weights}"
        )
    net = PathSketch(config)
    load_strict(net, read_weights(folder / WEIGHTS), folder / WEIGHTS)
    return net.eval().requires_grad_(False)
