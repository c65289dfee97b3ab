"""Folders of drift variants: config.json (family drift, its base model), model.safetensors (what is the variant's own).
Classes, body and the decoder of latents are the base model's, which is named with a digest of its weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from bozzetto.errors import UsageError
from bozzetto.files import write_text
from bozzetto.models.continuous_store import load_continuous
from bozzetto.models.drift import DriftConfig, DriftModel
from bozzetto.models.eagle_store import target_digest
from bozzetto.models.flow import FlowModel
from bozzetto.models.store import CONFIG, WEIGHTS, config_from, load_strict, read_config, read_weights, save_state

DRIFT = "drift"


def save_drift(folder: Path, model: DriftModel, base: str, base_folder: Path, notes: dict[str, Any]) -> None:
    """base: what the base model is loaded by, a shipped name or a path; base_folder: where it lies."""
    save_state(folder / WEIGHTS, model.own_state(), compact=True)
    content = {"family": DRIFT, "config": dataclasses.asdict(model.config), "base": base}
    content |= {"base_weights": target_digest(base_folder), **notes}
    write_text(folder / CONFIG, json.dumps(content, indent=2) + "\n")


def load_base(folder: Path) -> FlowModel:
    """A flow model that a variant is made from. Raises UsageError for another family."""
    base = load_continuous(folder)
    if not isinstance(base, FlowModel):
        raise UsageError(f"{folder}: a drift variant is made from a flow model")
    return base


def load_drift(folder: Path, base_folder: Path) -> DriftModel:
    """Read a variant; float32, in evaluation mode.

    Raises UsageError for another base than it was trained for, and for missing, misshapen or non-finite weights.
    """
    content = read_config(folder)
    config = config_from(DriftConfig, content.get("config"), folder / CONFIG)
    found = target_digest(base_folder)
    if content.get("base_weights") != found:
        raise UsageError(
            f"{folder}: made from other weights of {content.get('base')!r} ({content.get('base_weights')}) than those "
            f"in {base_folder} ({found})"
        )
    model = DriftModel(load_base(base_folder), config)
    state, own = read_weights(folder / WEIGHTS), model.own_state()
    if missing := sorted(own.keys() - state.keys()):
        raise UsageError(f"{folder / WEIGHTS}: missing {', '.join(missing[:4])} ({len(missing)} in all)")
    load_strict(model, {**model.state_dict(), **state}, folder / WEIGHTS)
    return model.eval().requires_grad_(False)
