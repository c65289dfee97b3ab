"""Folders that hold a model: config.json, safetensors, MODEL_CARD.md. Strict about keys, shapes and finite numbers.

Weights are stored as float16 and computed with as float32 or bfloat16. A compact file holds matrices as int8 with one
scale per row, under the name of the matrix and `.scale`: half the size, rounded to 1/254 of a row's largest weight.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bozzetto.autoencoders.llamagen_vq import LlamaGenVQ, LlamaGenVQConfig, from_published
from bozzetto.autoencoders.vq import VQConfig, VQTokenizer
from bozzetto.errors import UsageError
from bozzetto.files import read_json, write_text, write_whole
from bozzetto.models.llamagen import LlamaGen, LlamaGenConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"
TOKENIZER_CONFIG, TOKENIZER_WEIGHTS = "tokenizer.json", "tokenizer.safetensors"
_SCALE = ".scale"
TINY, PUBLISHED = "vq-tiny", "vq-llamagen"  # kinds of tokenizer
Tokenizer = VQTokenizer | LlamaGenVQ


def read_config(folder: str | Path, name: str = CONFIG) -> dict[str, Any]:
    """A JSON object of a model folder. Raises UsageError when the file is missing or holds something else."""
    path = Path(folder) / name
    if not path.is_file():
        raise UsageError(f"not a model folder: {path} does not exist")
    return read_json(path)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file as float32. Raises UsageError for a broken file or non-finite numbers."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"weights not found: {path}")
    try:
        with safe_open(path, framework="pt") as f:
            state = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UsageError(f"{path}: not a readable safetensors file: {error}") from error
    for key, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UsageError(f"{path}: weight {key!r} has non-finite values")
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    for key in [k for k in state if k + _SCALE in state]:
        state[key] = state[key] * state.pop(key + _SCALE)
    return state


def check_fit(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise UsageError that names missing, unexpected and misshapen keys."""
    problems = [f"missing key {k!r}" for k in wanted if k not in state]
    problems += [f"unexpected key {k!r}" for k in state if k not in wanted]
    problems += [
        f"{k!r} has shape {tuple(state[k].shape)}, expected {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in state and state[k].shape != v.shape
    ]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise UsageError(f"{source}: checkpoint does not fit: " + "; ".join(problems[:5]) + more)


def load_strict(module: nn.Module, state: dict[str, Tensor], source: str | Path, assign: bool = False) -> None:
    """load_state_dict that explains itself (`check_fit`). assign: take the tensors themselves, for a module that was
    made on the meta device."""
    check_fit(module.state_dict(), state, source)
    module.load_state_dict(state, assign=assign)


def save_state(path: str | Path, state: Mapping[str, Tensor], compact: bool = False) -> None:
    """Write tensors as float16 safetensors, whole or not at all; compact: matrices as int8 rows (see above).

    Raises UsageError when a weight is not finite in float16.
    """
    halves = {}
    for key, value in state.items():
        if compact and value.ndim == 2 and bool(torch.isfinite(value).all()):
            scale = (value.float().abs().amax(1, keepdim=True) / 127).clamp_min(1e-12)
            halves[key] = (value.float() / scale).round().to(torch.int8)
            halves[key + _SCALE] = scale
            continue
        stored = value.half() if value.is_floating_point() else value
        if stored.is_floating_point() and not bool(torch.isfinite(stored).all()):
            raise UsageError(f"{path}: weight {key!r} has values that float16 cannot hold")
        halves[key] = stored.contiguous(memory_format=torch.contiguous_format)
    write_whole(path, lambda name: save_file(halves, name))


def save_weights(path: str | Path, module: nn.Module) -> None:
    """`save_state` of a module."""
    save_state(path, module.state_dict())


def save_tokenizer(folder: str | Path, model: Tokenizer, notes: dict[str, Any]) -> None:
    """Write tokenizer.safetensors and tokenizer.json (its kind, its config and `notes`)."""
    if isinstance(model, LlamaGenVQ):
        write_tokenizer(folder, PUBLISHED, model.config, model.published_state(), notes)
    else:
        write_tokenizer(folder, TINY, model.config, model.state_dict(), notes)


def write_tokenizer(
    folder: str | Path,
    kind: str,
    config: VQConfig | LlamaGenVQConfig,
    state: Mapping[str, Tensor],
    notes: dict[str, Any],
) -> None:
    """What save_tokenizer writes, from its parts. state: under published names where the kind is `vq-llamagen`."""
    folder = Path(folder)
    save_state(folder / TOKENIZER_WEIGHTS, state)
    content = {"kind": kind, "config": dataclasses.asdict(config), **notes}
    write_text(folder / TOKENIZER_CONFIG, json.dumps(content, indent=2) + "\n")


def load_tokenizer(folder: str | Path) -> Any:
    """Read what save_tokenizer wrote, a Tokenizer; float32, in evaluation mode.

    Raises UsageError for missing, broken or unfitting files, an unknown kind, or a missing extra package.
    """
    folder = Path(folder)
    source, weights = folder / TOKENIZER_CONFIG, folder / TOKENIZER_WEIGHTS
    content = read_config(folder, TOKENIZER_CONFIG)
    kind = content.get("kind", TINY)  # folders of before there were kinds
    model: Tokenizer
    if kind == TINY:
        model = VQTokenizer(config_from(VQConfig, content.get("config"), source))
        load_strict(model, read_weights(weights), weights)
    elif kind == PUBLISHED:
        config = config_from(LlamaGenVQConfig, content.get("config"), source)
        with torch.device("meta"):  # drawing 72 million random numbers only to overwrite them takes seconds
            model = LlamaGenVQ(config)
        load_strict(model, from_published(read_weights(weights)), weights, assign=True)
    else:
        raise UsageError(f"{source}: kind is {kind!r} (allowed: {TINY!r}, {PUBLISHED!r})")
    return model.eval().requires_grad_(False)


def config_from(kind: type, values: object, source: str | Path) -> Any:
    """Build a config dataclass; unknown or missing keys are a UsageError."""
    if not isinstance(values, dict):
        raise UsageError(f"{source}: `config` must be a mapping, found {type(values).__name__}")
    allowed = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(allowed))
    if unknown:
        raise UsageError(f"{source}: unknown config key {unknown[0]!r} (allowed: {', '.join(allowed)})")
    try:
        return kind(**values)
    except TypeError as error:
        raise UsageError(f"{source}: {error}") from error


def save_llamagen(
    folder: str | Path, model: LlamaGen, tokenizer: Tokenizer, notes: dict[str, Any], compact: bool = False
) -> None:
    """Write a complete model folder: config.json, model.safetensors and its tokenizer. compact: see `save_state`."""
    folder = Path(folder)
    save_state(folder / WEIGHTS, model.state_dict(), compact)
    save_tokenizer(folder, tokenizer, {})
    content = {"family": "llamagen", "config": dataclasses.asdict(model.config), **notes}
    write_text(folder / CONFIG, json.dumps(content, indent=2) + "\n")


def load_llamagen(folder: str | Path) -> LlamaGen:
    """Read the network of a model folder; float32, in evaluation mode."""
    folder = Path(folder)
    content = read_config(folder)
    if content.get("family") != "llamagen":
        raise UsageError(f"{folder / CONFIG}: family is {content.get('family')!r} (allowed: 'llamagen')")
    model = LlamaGen(config_from(LlamaGenConfig, content.get("config"), folder / CONFIG))
    load_strict(model, read_weights(folder / WEIGHTS), folder / WEIGHTS)
    return model.eval().requires_grad_(False)
