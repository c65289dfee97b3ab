"""Folders of drift variants: config.json (family drift, its base model), model.safetensors (what is the variant's own).
Classes, body and the decoder of latents are the base model's, which is named with a digest of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bozzetto.checkpoints.continuous_store import load_continuous
from bozzetto.checkpoints.store import (
    CONFIG,
    WEIGHTS,
    choose,
    fill,
    on_meta,
    read_config,
    read_weights,
    save_state,
    target_digest,
    write_config,
)
from bozzetto.common.checks import clipped, config_from, naming
from bozzetto.errors import UsageError
from bozzetto.targets.drift import DriftConfig, DriftModel
from bozzetto.targets.flow import FlowModel

DRIFT = "drift"


def save_drift(folder: Path, model: DriftModel, base: str, base_folder: Path, notes: dict[str, Any]) -> None:
    """base: what the base model is loaded by, a shipped name or a path; base_folder: where it lies."""
    save_state(folder / WEIGHTS, model.own_state(), compact=True)
    made_from = {"base": base, "base_weights": target_digest(base_folder)}
    write_config(folder, {"family": DRIFT}, model.config, {**made_from, **notes})


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
    content, source = read_config(folder), folder / CONFIG
    config = config_from(choose(content, "family", {DRIFT: DriftConfig}, source), content.get("config"), source)
    found = target_digest(base_folder)
    if content.get("base_weights") != found:
        raise UsageError(
            f"{folder}: made from other weights of {clipped(content.get('base'))} "
            f"({clipped(content.get('base_weights'))}) than those in {base_folder} ({found})"
        )
    base = load_base(base_folder)
    with naming(source):  # more tuned blocks than the base has
        model = on_meta(lambda: DriftModel(base, config))
    state = read_weights(folder / WEIGHTS, model.own_state())
    return fill(model, {**model.state_dict(), **state})
