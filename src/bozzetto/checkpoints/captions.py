"""Captions as features: what a text-conditional target is given in place of classes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bozzetto.checkpoints.weights import FLOATS, WHOLE, TensorHeader, header_of, open_tensors, save_tensors
from bozzetto.common.files import parse_json
from bozzetto.errors import UsageError
from bozzetto.targets.llamagen import LlamaGenConfig, left_pad


def read_captions(path: str | Path, config: LlamaGenConfig) -> tuple[list[str], Tensor, Tensor]:
    """Captions, their features float32 [K, T, C] and mask bool [K, T], padded on the left as LlamaGen wants them.

    path: a safetensors file with `features` [K, T, C] and `mask` [K, T] as the text encoder gives them (the published
    models: flan-t5-xl, T = 120, C = 2048; padded on the right), and the K captions as a JSON list under `captions` in
    its metadata (missing: they are called 0, 1, 2, ...). Raises UsageError for anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"captions not found: {path}")
    with open_tensors(path) as content:
        _check_header(path, header_of(content), config)
        features, mask = (content.get_tensor(name) for name in ("features", "mask"))
        listed = (content.metadata() or {}).get("captions", "null")
    features, mask = features.to(torch.float32, copy=True), mask.bool()
    if not bool(torch.isfinite(features).all()):
        raise UsageError(f"{path}: features have non-finite values")
    if bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise UsageError(f"{path}: mask has a real token after padding (wanted: padding on the right)")
    names = parse_json(listed, f"{path}: captions in its metadata", (list, type(None)))
    if names is None:
        names = [str(i) for i in range(len(features))]
    if len(names) != len(features) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{path}: its metadata lists captions that are not {len(features)} texts")
    return names, *left_pad(features, mask)


def write_captions(path: str | Path, captions: Sequence[str], features: Tensor, mask: Tensor) -> None:
    """The file that `read_captions` reads, whole or not at all. features [K, T, C], mask [K, T]: as a text encoder
    gives them, padded on the right."""
    tensors = {"features": features.contiguous(), "mask": mask.to(torch.uint8).contiguous()}
    save_tensors(path, tensors, {"captions": json.dumps(list(captions))})


def _check_header(path: Path, held: Mapping[str, TensorHeader], config: LlamaGenConfig) -> None:
    """Before anything is read: what there is, of which type and shape."""
    if missing := sorted({"features", "mask"} - held.keys()):
        raise UsageError(f"{path}: missing {', '.join(missing)} (wanted: features [K, T, C] and mask [K, T])")
    for name, allowed in (("features", FLOATS), ("mask", (*FLOATS, *WHOLE))):
        if held[name].type not in allowed:
            raise UsageError(f"{path}: {name} of type {held[name].type} are not allowed: {', '.join(allowed)}")
    features, mask = held["features"].shape, held["mask"].shape
    wanted = (max(1, features[0]) if features else 1, config.condition_tokens, config.caption_dim)
    if features != wanted or mask != wanted[:2]:
        raise UsageError(
            f"{path}: features {features} and mask {mask} do not fit this target: "
            f"[K, {wanted[1]}, {wanted[2]}] and [K, {wanted[1]}]"
        )
