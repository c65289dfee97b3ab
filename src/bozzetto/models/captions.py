"""Captions as features: what a text-conditional target is given in place of classes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bozzetto.errors import UsageError
from bozzetto.models.llamagen import LlamaGenConfig, left_pad


def read_captions(path: str | Path, config: LlamaGenConfig) -> tuple[list[str], Tensor, Tensor]:
    """Captions, their features float32 [K, T, C] and mask bool [K, T], padded on the left as LlamaGen wants them.

    path: a safetensors file with `features` [K, T, C] and `mask` [K, T] as the text encoder gives them (the published
    models: flan-t5-xl, T = 120, C = 2048; padded on the right), and the K captions as a JSON list under `captions` in
    its metadata (missing: they are called 0, 1, 2, ...). Raises UsageError for anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"captions not found: {path}")
    try:
        with safe_open(path, framework="pt") as f:
            found = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
            names = json.loads((f.metadata() or {}).get("captions", "null"))
    except (SafetensorError, ValueError) as error:
        raise UsageError(f"{path}: not a readable safetensors file of captions: {error}") from error
    missing = {"features", "mask"} - set(found)
    if missing:
        raise UsageError(f"{path}: missing {', '.join(sorted(missing))} (wanted: features [K, T, C] and mask [K, T])")
    features, mask = found["features"].float(), found["mask"].bool()
    wanted = (len(features), config.condition_tokens, config.caption_dim)
    if tuple(features.shape) != wanted or tuple(mask.shape) != wanted[:2] or not wanted[0]:
        raise UsageError(
            f"{path}: features {tuple(features.shape)} and mask {tuple(mask.shape)} do not fit this target: "
            f"[K, {wanted[1]}, {wanted[2]}] and [K, {wanted[1]}]"
        )
    if not bool(torch.isfinite(features).all()):
        raise UsageError(f"{path}: features have non-finite values")
    if names is None:
        names = [str(i) for i in range(len(features))]
    if not isinstance(names, list) or len(names) != len(features):
        raise UsageError(f"{path}: its metadata lists captions that are not {len(features)} texts")
    return [str(name) for name in names], *left_pad(features, mask)
