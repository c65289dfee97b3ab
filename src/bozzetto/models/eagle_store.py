"""Folders that hold a drafter: config.json, model.safetensors. A drafter names the target it was trained for."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bozzetto.errors import UsageError
from bozzetto.files import digest, write_text
from bozzetto.models.convert import check_out, read_state, write_folder
from bozzetto.models.eagle import EagleConfig, EagleNet, eagle_config
from bozzetto.models.llamagen import LlamaGen, LlamaGenConfig
from bozzetto.models.store import (
    CONFIG,
    WEIGHTS,
    config_from,
    load_llamagen,
    load_strict,
    read_config,
    read_weights,
    save_weights,
)

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
        raise UsageError(
            f"{folder}: a drafter of another target: it was trained for the weights of {name!r} "
            f"({content['target_weights']}), the target's are {weights}"
        )
    net = EagleNet(config)
    load_strict(net, read_weights(folder / WEIGHTS), folder / WEIGHTS)
    return net.eval().requires_grad_(False)


def convert_eagle(drafter: Path, model: Path, out: Path) -> str:
    """Turn a published EAGLE drafter of a LlamaGen target into a drafter folder; returns a line about it.

    drafter: a torch pickle (opened with weights_only=True) or safetensors file with `fc`, `layers.0...` and
    `embed_tokens.weight`; model: the folder of its target. The published drafters hold the rows of the target's head
    in place of its embedding (LANTERN, arXiv 2410.03355): which of the two it is, is found by comparison.
    Raises UsageError for a file of another family, of another target, or with missing or misshapen keys.
    """
    state = {key: value.float() for key, value in read_state(drafter).items()}
    if "fc.weight" not in state or "layers.0.self_attn.q_proj.weight" not in state:
        found = ", ".join(sorted(state)[:4]) or "nothing"
        raise UsageError(f"{drafter}: not an EAGLE drafter (wanted fc.weight, layers.0.self_attn...; found {found})")
    target = load_llamagen(model)
    config = replace(eagle_config(target.config), ffn=len(state.get("layers.0.mlp.gate_proj.weight", ())))
    if state["fc.weight"].shape != (config.dim, 2 * config.dim):
        wanted = (config.dim, 2 * config.dim)
        raise UsageError(
            f"{drafter}: a drafter of another target: fc.weight has shape {tuple(state['fc.weight'].shape)}, "
            f"this target wants {wanted}"
        )
    rows = state.pop(EMBEDDING, None)
    if rows is not None:
        config = replace(config, embedding=_which_rows(drafter, rows, target))
    net = EagleNet(config)
    load_strict(net, state, drafter)
    notes = {"target_name": read_config(model).get("name", model.name), "converted": drafter.name}
    check_out(out)
    write_folder(out, lambda folder: save_eagle(folder, net, model, notes))
    return f"drafter of {config.dim} dimensions, tokens embedded by the target's {config.embedding} rows: {out}"


def _which_rows(path: Path, rows: Tensor, target: LlamaGen) -> str:
    """`head` or `tokens`: whose rows a drafter was trained with."""
    for name, own in (("head", target.output.weight), ("tokens", target.tok_embeddings.weight)):
        if rows.shape == own.shape and torch.allclose(rows, own, rtol=1e-2, atol=1e-3):
            return name
    raise UsageError(f"{path}: a drafter of another target: {EMBEDDING} holds neither its head's nor its token rows")
